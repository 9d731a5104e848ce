"""One model, measured by the evaluators: the items and the noise are those of all models, the rest is its own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nai_xl.data.index import Index
from nai_xl.data.loader import Encoded
from nai_xl.data.rows import Item
from nai_xl.diffusion.sampling import Sampling
from nai_xl.engine.encode import Encoder
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import Bucket, Bucketing, Cache, Evaluator, Precision
from nai_xl.judge.levels import PREFIX
from nai_xl.judge.models import Model
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.vae import decode_latents
from nai_xl.optimizer.ema import NoEma
from nai_xl.sample.painter import as_trained
from nai_xl.tracker.jsonl import NoTracker

STEP = 0  # of every measurement: a finished model has no other
LOOKED_AT = 4  # images that autoencoders are compared on
SAME_LATENTS = 0.01  # relative; rounding an autoencoder to fp16 changes its latents by less


@dataclass
class Bench:
    """What all models are measured with. The latents of the items are the first model's."""

    evals: Sequence[Evaluator]
    sampling: Sampling
    bucketing: Bucketing
    cache: Cache
    precision: Precision
    square: Bucket
    items: Sequence[Item]  # that evaluators may look at
    device: torch.device
    notes: list[str] = field(default_factory=list)
    first: Encoded | None = None
    other_latents: set[Model] = field(default_factory=set)

    def measure(self, model: Model, home: Path) -> dict[str, float]:
        """Metric -> value. Each item's own value is written below `home`."""
        parts = load_sdxl(model.weights, config=model.configs)
        studio = self._studio(model, parts, home)
        values: dict[str, float] = {}
        for evaluator in self.evals:
            values |= evaluator.run(STEP, studio)
        del parts, studio
        gc.collect()
        return values

    def _looked_at(self) -> list[Item]:
        return list(dict.fromkeys(chain.from_iterable(e.held_out(self.items) for e in self.evals)))

    def _studio(self, model: Model, parts: Components, home: Path) -> Studio:
        encoded = self._encoded(model, parts)
        parts.unet.to(self.device)
        parts.vae.to(self.device)

        def decode(latents: Tensor) -> list[Image.Image]:
            return decode_latents(parts.vae, latents / parts.vae.config.scaling_factor)

        return Studio(
            denoise=as_trained(parts, self.precision, self.device),
            schedule=model.schedule,
            parameterization=model.parameterization,
            sampling=self.sampling,
            condition=encoded.condition,
            decode=decode,
            ema=NoEma(dict(parts.unet.named_parameters())),
            tracker=NoTracker(),
            encoded=encoded,
            square=self.square,
            run_dir=home,
            device=self.device,
        )

    def _encoded(self, model: Model, parts: Components) -> Encoded:
        """The first model's latents of the items, and this model's conditions of all texts."""
        encoder = Encoder(parts, self.cache, "fp32", self.device)
        std = torch.full((4, 1, 1), 1 / parts.vae.config.scaling_factor)
        if self.first is None:
            self.first = self._encode(encoder, std)
        index = self.first.index
        captions = [item.caption for item in index.items]
        texts = [*chain.from_iterable(e.texts(self.items) for e in self.evals), *captions]
        encoded = replace(self.first, texts=encoder.encode_captions(lambda: texts, model.chunks))
        self._compare(model, encoder, std, encoded)
        return encoded

    def _encode(self, encoder: Encoder, std: Tensor) -> Encoded:
        looked_at = self._looked_at()
        index = Index(looked_at)
        refs = encoder.latent_refs(index, self.bucketing)
        if bad := encoder.encode_images([refs]):
            self.items = [item for item in self.items if item.path not in bad]
            self.notes += [f"{path}: {reason}: left out" for path, reason in bad.items()]
            return self._encode(encoder, std)  # others take their places
        held = [*zip(looked_at, (row[0] for row in refs), strict=True)]
        return Encoded(index, refs, None, self.cache, torch.zeros(4, 1, 1), std, torch.ones(len(held)), held)

    def _compare(self, model: Model, encoder: Encoder, std: Tensor, encoded: Encoded) -> None:
        """Note a model whose autoencoder makes other latents of the same images."""
        some = Index(encoded.index.items[:LOOKED_AT])
        refs = encoder.latent_refs(some, self.bucketing)
        encoder.encode_images([refs])
        own = replace(encoded, std=std)
        far = 0.0
        for [ref, *_], (_, theirs) in zip(refs, encoded.held_out[:LOOKED_AT], strict=True):
            latents, first = own.latents_of(ref), encoded.latents_of(theirs)
            far = max(far, float((latents - first).norm() / first.norm()))
        if far > SAME_LATENTS:
            self.other_latents.add(model)
            self.notes.append(
                f"{model.side}: {model.path} has latents of its own (they differ by {far:.0%}), in which errors have "
                f"another unit: {PREFIX} is left out"
            )
