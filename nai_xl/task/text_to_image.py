"""task=text_to_image: SDXL's network learns to denoise the latents of captioned images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from nai_xl.data.captions import Captions
from nai_xl.data.index import Index, refuse_empty
from nai_xl.data.keys import TextKeys
from nai_xl.data.loader import Encoded, Placed, not_finite, shortened
from nai_xl.data.noise import TrainingNoise
from nai_xl.data.rows import Item, Rows
from nai_xl.diffusion.diagnosis import diagnose, sentences
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.sampling import Sampling
from nai_xl.diffusion.timesteps import strata_of
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.checkpoint import ModuleState
from nai_xl.engine.encode import Encoder
from nai_xl.engine.loop import RunSettings
from nai_xl.engine.nonfinite import Sample, Traced
from nai_xl.errors import UserError, keyed
from nai_xl.evals import method_figure
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import (
    Batch,
    Bucket,
    Bucketing,
    Cache,
    Evaluator,
    Losses,
    Native,
    Stateful,
    Tracker,
)
from nai_xl.memory.action import MemoryAction
from nai_xl.model.export import save_pipeline
from nai_xl.model.flops import by_area, training_flops
from nai_xl.model.latents import Moments, Stored, read_statistics
from nai_xl.model.sdxl.components import Components
from nai_xl.model.text import LiveEncoders
from nai_xl.model.vae import decode_latents
from nai_xl.record.run_dir import RunDirectory
from nai_xl.rng import draws
from nai_xl.task import long_captions
from nai_xl.task.objective import headline
from nai_xl.task.task import refuse_other_tasks
from nai_xl.task.text_images import TextImages


@dataclass(kw_only=True)
class TextToImage:
    """The denoising network of a text-to-image model; Rombach et al., 2112.10752, Podell et al., 2307.01952.

    Delivered is a diffusers pipeline. A field is the config's group or node of its name.
    """

    headline: ClassVar[tuple[str, ...]] = ("model", "schedule", "parameterization", "loss")

    objective: Objective
    noise: TrainingNoise
    bucketing: Bucketing
    captions: Captions
    text: Any
    latents: Any
    sample_weights: Callable[..., Tensor]
    sampling: Sampling
    evals: Sequence[Evaluator]
    native: Native
    precision: Any
    memory: Sequence[MemoryAction]
    run: RunSettings
    components: Components = field(init=False, repr=False)
    size: int = field(init=False, repr=False)  # parameters of the UNet
    live: LiveEncoders | None = field(default=None, init=False, repr=False)  # where the step encodes the text

    def __post_init__(self) -> None:
        edge = self.native.resolution
        self.on_native = self.objective.on_canvas(edge, edge)
        self.timesteps = len(self.objective.schedule)
        with keyed("sampling"):  # refuses more steps than there are
            self.objective.schedule.inference_timesteps(self.sampling.steps)
        if not self.text.in_step and self.captions.texts(()) is None:
            raise UserError(
                "text=cached encodes every text beforehand, and these captions vary without end; set text=live, or "
                "captions=plain"
            )

    def refuse(self, index: Index) -> None:
        refuse_other_tasks(self.evals, "text_to_image", "'evals=[sample_grid]'")
        self._looked_at(index)

    def load(self, model: Callable[[], Components]) -> nn.Module:
        self.components = model()
        network: nn.Module = self.components.unet
        self.size = sum(p.numel() for p in network.parameters())  # an engine may share them out
        return network

    # --- data ---------------------------------------------------------------------------------------------------------

    def prepare(self, index: Index, cache: Cache, strategy: Strategy, run: RunDirectory) -> TextImages:
        """Fill the cache, leave out what could not be read, and say which keys training reads."""
        # a run that goes on has what it began with, whatever has become of defaults and the cache
        begun = read_statistics(run.latents) if run.latents.is_file() else None
        default: Stored = begun[2] if begun else "bf16" if self.compute_dtype is torch.bfloat16 else "fp32"
        stored: Stored = self.latents.stored or default
        encoder = Encoder(self.components, cache, self.latents.dtype, strategy.device, stored, strategy.team)
        bucketing = self.bucketing.merged(index.items.sizes, self.run.chunk_size(strategy.world))
        refs = encoder.latent_refs(index, bucketing)
        looked_at = self._looked_at(index)
        found = encoder.encode_images(
            [refs, replace(refs, rows=Rows.of(looked_at))],
            beside=lambda: self._bytes_of_texts(index, looked_at, encoder),
        )
        bad = dict(strategy.gather_objects(list(found.items())))
        held = [item for item in looked_at if item.path not in bad]
        index = index.without(bad)
        refuse_empty(index, "data")
        texts = self._encode_texts(index, held, encoder)
        if strategy.first:
            cut = long_captions.told(index.items, self.captions, self.components.tokenizers[0], self.text.chunks)
            index = replace(index, remarks=[*index.remarks, *cut])
        strategy.wait()
        refs = encoder.latent_refs(index, bucketing)
        if begun:
            mean, std, _ = begun
        else:
            mean, std = self.latents.statistics(
                self.components.vae,
                functools.partial(_measured, index, refs, encoder, strategy),
            )
        with keyed("sample_weights"):
            weights = self.sample_weights(index=index)
        shown_to = [(item, refs.of(item)[0]) for item in held]
        encoded = Encoded(index, refs, texts, cache, mean, std, weights, shown_to)
        return self.samples(encoded, strategy.world, stored)

    def _encode_texts(self, index: Index, held: Sequence[Item], encoder: Encoder) -> TextKeys | None:
        """How texts are found in the cache; None where they are encoded in the steps, for which all is made ready."""
        if self.text.in_step:
            parts, device = self.components, encoder.device
            self.live = LiveEncoders.of(
                parts.tokenizers, parts.text_encoders, self.text.chunks, device, self.compute_dtype
            )
            return None
        return encoder.encode_captions(lambda: self._texts(index, held), *self._kept)

    def _bytes_of_texts(self, index: Index, held: Sequence[Item], encoder: Encoder) -> int:
        return 0 if self.text.in_step else encoder.bytes_of_captions(lambda: self._texts(index, held), *self._kept)

    @property
    def _kept(self) -> tuple[int, Literal["fp32", "bf16"]]:
        """What encoded texts depend on."""
        return self.text.chunks, self.text.kept_as(self.compute_dtype)

    def _texts(self, index: Index, held: Sequence[Item]) -> Iterator[str]:
        """All texts that a run may read from the cache, some of them more than once."""
        drawn = chain.from_iterable(self.captions.texts(several) or () for several in index.items.captions())
        shown = chain.from_iterable(evaluator.texts(index.items) for evaluator in self.evals)
        return chain(drawn, shown, (item.caption for item in held))

    def samples(self, encoded: Encoded, world: int = 1, stored: Stored = "fp32") -> TextImages:
        """What batches are drawn from, of images, and of texts unless the step encodes them, that lie in a cache.

        world: processes that train. stored: the latents' precision in the cache.
        """
        strata = functools.partial(strata_of, self.objective.timesteps)
        tokens = self.live.tokens if self.live else None
        return TextImages(encoded, self.captions, self.noise, strata, self.run, world, tokens, stored)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in."""
        set_by_action = (action.weights_in for action in self.memory if action.weights_in is not None)
        autocast = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision.autocast]
        return next(set_by_action, autocast)

    def _looked_at(self, index: Index) -> list[Item]:
        """The held-out images that evaluators look at."""
        return list(dict.fromkeys(chain.from_iterable(e.held_out(index.held_out) for e in self.evals)))

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        values, level = self.objective(module, self._conditioned(batch))
        return Losses(values, level.t)

    def _conditioned(self, batch: Batch) -> Batch:
        """The batch with the conditions of its texts, in a precision that the network takes."""
        if self.live:
            batch = self.live.encoded(batch)
        # bfloat16 is what autocast, or a network in it, would round them to; autocast to float16 takes float32 too
        type = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
        return replace(batch, context=batch.context.to(type), pooled=batch.pooled.to(type))

    def traced(self, data: TextImages, sample: Sample, seed: int) -> Traced:
        encoded, item = data.encoded, data.index.items[sample.item]
        if sample.position < 0:
            return Traced(str(item.path), f"timestep {sample.axis:.6g}")
        ref, text = encoded.drawn(draws(seed, sample.position), sample.item, self.captions)
        bucket = ref.placement.bucket
        schedule = self.objective.schedule.for_canvas(bucket.height, bucket.width)
        t = torch.tensor([sample.axis], dtype=torch.float64)
        level = schedule.at(t.long() if float(sample.axis).is_integer() else t)
        words = f"timestep {sample.axis:.6g}, alpha {level.alpha.item():.4g}, sigma {level.sigma.item():.4g}"
        entries = {ref.key: f"{item.path}"}
        if encoded.texts is not None:
            entries[encoded.texts(text)] = f"the text {shortened(text)} of {item.path}"
        faults = [fault for key, of in entries.items() if (fault := not_finite(encoded.cache, key, of))]
        if self.live and not all(tensor.isfinite().all() for tensor in self.live.condition(text)):
            told = f"the text {shortened(text)} of {item.path}"
            faults.append(f"What the text encoders make of {told} is not finite: set precision=bf16 or fp32.")
        if not encoded.weights[sample.item].isfinite():
            faults.append(f"The sample weight of {item.path} is not finite: set another sample_weights.")
        return Traced(str(item.path), words, " ".join(faults) or None)

    def free_groups(self, device: torch.device) -> list[dict[str, Any]]:
        self.objective.learned.to(device)
        return self.objective.parameter_groups()

    def stateful(self) -> Mapping[str, Stateful]:
        return {"objective": ModuleState(self.objective.learned)}

    def flops(self, data: TextImages) -> Callable[[int, int, int], int]:
        """Counted when first asked for."""

        @functools.cache
        def all_canvases(tokens: int) -> dict[Bucket, int]:
            count = functools.partial(training_flops, self.components.unet, tokens=tokens)
            return by_area(count, data.canvases)

        return lambda height, width, tokens: all_canvases(tokens)[Bucket(width, height)]

    # --- looking and delivering ---------------------------------------------------------------------------------------

    def studio(self, data: TextImages, state: State, tracker: Tracker, run: RunDirectory) -> Studio:
        device, encoded = state.strategy.device, data.encoded

        def decode(latents: Tensor) -> list[Image.Image]:
            vae = self.components.vae.to(device)
            images = decode_latents(vae, latents.cpu() * encoded.std + encoded.mean)
            vae.to("cpu")
            return images

        return Studio(
            denoise=state.trainable.module,
            schedule=self.objective.schedule,
            parameterization=self.objective.parameterization,
            sampling=self.sampling,
            condition=self.live.condition if self.live else encoded.condition,
            decode=decode,
            ema=state.ema,
            tracker=tracker,
            encoded=encoded,
            square=Bucket(self.native.resolution, self.native.resolution),
            run_dir=run.path,
            device=device,
        )

    def described(self) -> Mapping[str, str]:
        return {"UNet": f"{self.size:,} parameters on {next(self.components.unet.parameters()).device}"}

    def remarks(self) -> Iterable[str]:
        return sentences(self.on_native, self.native.resolution)

    def figure(self, choices: Mapping[str, str]) -> Image.Image:
        return method_figure.method([method_figure.Variant(diagnose(self.on_native))], headline(choices))

    @property
    def delivered(self) -> str:
        return "diffusers: StableDiffusionXLPipeline.from_pretrained"

    def deliver(self, data: TextImages, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_pipeline(
            self.components,
            weights,
            self.on_native.schedule,
            self.on_native.parameterization,
            mean=data.encoded.mean,
            std=data.encoded.std,
            resolution=self.native.resolution,
            path=folder,
        )


def _measured(index: Index, refs: Placed, encoder: Encoder, strategy: Strategy) -> Moments:
    """Collective: the moments of all latents. Raises UserError naming the entries by which they are not finite."""
    moments = functools.reduce(Moments.__add__, strategy.gather_objects([encoder.measure(refs)]))
    if not (moments.mean.isfinite().all() and moments.std.isfinite().all()):
        pairs = ((ref.key, item.path) for item, row in zip(index.items, refs, strict=True) for ref in row)
        share = islice(pairs, strategy.rank, None, strategy.world)
        faults = (fault for key, of in share if (fault := not_finite(encoder.cache, key, of)))
        if named := strategy.gather_objects(list(faults)):
            raise UserError(" ".join(named[:4]))
    return moments
