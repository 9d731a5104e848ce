"""python -m nai_xl.train [group=option ...] [key=value ...]: train one run, or continue it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from nai_xl import config
from nai_xl.data.index import Index, Item, refuse_empty
from nai_xl.data.loader import Encoded, LatentRef, RankBatches, batches
from nai_xl.data.plan import Plan, by_bucket
from nai_xl.diffusion.diagnosis import diagnose, sentences
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.timesteps import Stratified
from nai_xl.engine.checkpoint import ModuleState
from nai_xl.engine.console import Screen, counted
from nai_xl.engine.encode import Encoder
from nai_xl.engine.gpus import find
from nai_xl.engine.loop import Pace, RunSettings, ScalerState, Stop, Training, train
from nai_xl.engine.meter import Meter
from nai_xl.engine.precompile import warm_up
from nai_xl.engine.prefetch import on_device
from nai_xl.evals import method_figure
from nai_xl.evals.painter import Studio
from nai_xl.files import write_atomically
from nai_xl.inspect.combinations import headline
from nai_xl.interfaces import Batch, Bucket, Tracker
from nai_xl.memory import process_wide
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.memory.compile import uncompiled
from nai_xl.model.export import save_pipeline
from nai_xl.model.flops import by_area, training_flops
from nai_xl.model.latents import Moments, Statistics, in_words, read_statistics, write_statistics
from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl import Components, check_sdxl
from nai_xl.model.vae import decode_latents
from nai_xl.optimizer.ema import NoEma
from nai_xl.optimizer.lr import LearningRate
from nai_xl.optimizer.stochastic import keep_layout
from nai_xl.optimizer.update import Update, UpdateInBackward, WholeUpdate
from nai_xl.profiler.advice import Setup
from nai_xl.profiler.profiler import NoProfiler, Profiler
from nai_xl.record.arm import ArmNote, objective
from nai_xl.record.provenance import git_commit
from nai_xl.record.run_dir import RunDirectory
from nai_xl.sweep.launch import Sweep, arm_of
from nai_xl.tracker.jsonl import NoTracker


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state."""


@dataclass
class Job:
    """One run: its config, its choices, and the cheap objects built from them before any weight is read."""

    cfg: DictConfig
    choices: Mapping[str, str]
    arm: Mapping[str, Any] = field(default_factory=dict)  # the values that a sweep gave the keys that it varies

    def __post_init__(self) -> None:
        self.build = functools.partial(config.build, plugins=tuple(self.cfg.plugins))
        self.settings: RunSettings = self.build(self.cfg.run)
        parts = {group: self.build(self.cfg[group]) for group in ("schedule", "parameterization", "timesteps", "error")}
        self.objective: Objective = self.build(self.cfg.objective, **parts, weighting=self.build(self.cfg.loss))
        edge = int(self.cfg.native.resolution)
        self.native = self.objective.on_canvas(edge, edge)
        self.noise = self.build(self.cfg.noise)
        self.objective.schedule.inference_timesteps(self.cfg.sampling.steps)  # refuses more steps than there are
        self.bucketing, self.captions = self.build(self.cfg.bucketing), self.build(self.cfg.captions)
        self.sampling, self.text = self.build(self.cfg.sampling), self.build(self.cfg.text)
        self.latents, self.cache = self.build(self.cfg.latents), self.build(self.cfg.cache)
        self.precision = self.build(self.cfg.precision)
        self.memory, self.evals = self._several("memory"), self._several("evals")
        refuse_misfits(self.memory, self.build(self.cfg.optimizer), self.precision.autocast)
        self.in_backward = next((action for action in self.memory if action.updates_in_backward), None)
        self.home = RunDirectory(config.run_dir(self.cfg, self.choices))
        self.note = ArmNote(self.home, arm_of(self.cfg, self.arm))

    def _several(self, group: str) -> list[Any]:
        """What is chosen of a group of which several options can be. Settings of one that is not are left alone."""
        nodes = (self.cfg.get(group) or {}).values()
        return [self.build(node) for node in nodes if "_target_" in node]

    def run(self) -> None:
        """Train, or continue, or say that there is nothing left to do."""
        with self.note:
            self._run_or_say()

    def _run_or_say(self) -> None:
        self.home.create()
        self._begin()
        if self.cfg.model.get("path"):
            check_sdxl(Path(self.cfg.model.path), self.cfg.model.config and Path(self.cfg.model.config))
        index = self.build(self.cfg.data).scan()
        self._looked_at(index)  # refuses an evaluator that lacks images, before any weight is read
        lock = self.home.lock() if self.accelerator.is_main_process else None
        try:
            self._run(index)
        finally:
            if lock:
                lock.release()

    def precompute(self) -> None:
        """Fill the cache with everything this run would read."""
        self._begin()
        encoded = self._encode(self.build(self.cfg.data).scan(), self.build(self.cfg.model))
        placed = sum(map(len, encoded.latents))
        self.screen.say(f"cached: {placed} latents of {len(encoded.index.items)} images, {len(encoded.texts)} texts")
        for skip in encoded.index.skipped:
            self.screen.say(f"skipped: {skip.path}: {skip.reason}")

    def _begin(self) -> None:
        self.accelerator: Accelerator = self.build(self.cfg.distributed).accelerator(
            autocast(self.memory, self.precision.autocast)
        )
        settings, world = self.settings, self.accelerator.num_processes
        settings.chunk_size(world)  # refuses a chunk that micro-batches do not divide
        if self.in_backward:
            self.in_backward.refuse(grad_accum=settings.grad_accum, precision=self.precision.autocast, world=world)
        self.screen = Screen(silent=not self.accelerator.is_main_process)

    def _run(self, index: Index) -> None:
        if self.accelerator.is_main_process:
            OmegaConf.save(self.cfg, self.home.path / "config.yaml", resolve=True)
        steps = self.settings.steps(len(index.items), self.accelerator.num_processes)
        checkpoints = self.build(self.cfg.checkpoint, dir=self.home.checkpoints, keep=self.settings.keep_checkpoints)
        if checkpoints.latest_step() >= steps and self.home.pipeline.is_dir():
            done = checkpoints.latest_step()
            self.note.reached(done, self.settings.images_per_step(self.accelerator.num_processes))
            more = f", more than the {steps} asked for; name=NAME begins a shorter one" if done > steps else ""
            longer = "continues it" if config.open_ended(self.cfg) else "with this lr is another run"
            self.screen.say(f"finished: this run has {done} steps{more}; a larger run.max_images {longer}")
            self._say_where(())
            return
        if self.accelerator.is_main_process:
            self.note.begin()
        components: Components = self.build(self.cfg.model)
        encoded = self._encode(index, components)
        if self.accelerator.is_main_process:
            encoded.index.write_skipped(self.home.path / "skipped.csv")
            self.home.claim_data(encoded.index.fingerprint(), len(encoded.index.items))
            write_atomically(self.home.latents, lambda path: write_statistics(path, (encoded.mean, encoded.std)))
        tracker = (
            self.build(self.cfg.tracker, run_dir=self.home.path) if self.accelerator.is_main_process else NoTracker()
        )
        try:
            with tracker, Stop() as stop, process_wide.restored():
                chosen = {**self.choices, **config.flat(self.cfg), "data_fingerprint": index.fingerprint()}
                tracker.params(chosen, {"seed": str(self.settings.seed), "git_commit": git_commit()})
                tracker.artifact(self.home.path / "config.yaml")
                self._train(components, encoded, checkpoints, tracker, stop, steps)
        except Stopped:
            # torchrun ends all processes soon after the first; the tracker's is done now
            self.accelerator.wait_for_everyone()
            raise
        self._say_where(tracker.where())

    # --- data ---------------------------------------------------------------------------------------------------------

    def _encode(self, index: Index, components: Components) -> Encoded:
        """Fill the cache, leave out what could not be read, and say which keys training reads."""
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        encoder = Encoder(components, self.cache, self.latents.dtype, accelerator.device, rank, world)
        both = Index([*index.items, *self._looked_at(index)])
        bad = dict(gather_object(list(encoder.encode_images(both, encoder.latent_refs(both, self.bucketing)).items())))
        held = [item for item in self._looked_at(index) if item.path not in bad]
        index = index.without(bad)
        refuse_empty(index, "data")
        drawn = chain.from_iterable(self.captions.texts(item.caption) for item in index.items)
        shown = chain.from_iterable(evaluator.texts(index.items) for evaluator in self.evals)
        texts = encoder.encode_captions(chain(drawn, shown, (item.caption for item in held)), self.text)
        accelerator.wait_for_everyone()
        refs = encoder.latent_refs(index, self.bucketing)
        mean, std = self._statistics(components, encoder, refs)
        weights = self.build(self.cfg.sample_weights, index=index)
        first = [row[0] for row in encoder.latent_refs(Index(held), self.bucketing)]
        return Encoded(index, refs, texts, self.cache, mean, std, weights, [*zip(held, first, strict=True)])

    def _looked_at(self, index: Index) -> list[Item]:
        """The held-out images that evaluators look at."""
        return list(dict.fromkeys(chain.from_iterable(e.held_out(index.held_out) for e in self.evals)))

    def _statistics(self, components: Components, encoder: Encoder, refs: list[list[LatentRef]]) -> Statistics:
        """mean, std [4,1,1] of the raw latents: those that the run began with, whatever has become of the cache."""
        if self.home.latents.is_file():
            return read_statistics(self.home.latents)

        def measure() -> Moments:
            return functools.reduce(Moments.__add__, gather_object([encoder.measure(refs)]))

        return self.latents.statistics(components.vae, measure)

    def _plan(self, encoded: Encoded) -> Plan:
        names = [refs[0].placement.bucket for refs in encoded.latents]
        return Plan(by_bucket(names), self.settings.seed, self.settings.chunk_size(self.accelerator.num_processes))

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(
        self, components: Components, encoded: Encoded, checkpoints: Any, tracker: Tracker, stop: Stop, steps: int
    ) -> None:
        accelerator, settings = self.accelerator, self.settings
        for action in self.memory:
            action.apply(components.unet)
        learned = self.objective.learned.to(accelerator.device)
        unet, optimizer, update = self._updating(components.unet)
        lr = LearningRate(optimizer, self.build(self.cfg.lr), steps)
        # the first process alone evaluates, saves and exports
        ema = (self.build(self.cfg.ema) if accelerator.is_main_process else NoEma)(model=components.unet)
        scaled = accelerator.scaler is not None
        world = accelerator.num_processes
        gpu = find(torch.cuda.get_device_name()) if accelerator.device.type == "cuda" else None
        meter = Meter(
            len(self.objective.schedule),
            gather=accelerator.gather,
            rank=accelerator.process_index,
            world=world,
            refuse_gradients=not scaled,
            flops=self._flops(components, encoded),
            peak_tflops=gpu.bf16_tflops if gpu else None,
        )
        checkpoints.bind(
            pace=Pace(settings.images_per_step(world), settings.chunk_size(world)),
            unet=ModuleState(components.unet),
            objective=ModuleState(learned),
            ema=ema,
            optimizer=optimizer,
            scaler=ScalerState(accelerator),
            meter=meter,
        )
        start = checkpoints.load_latest()
        sampler = RankBatches(
            self._plan(encoded),
            start=start * settings.images_per_step(world),
            batch_size=settings.batch_size,
            rank=accelerator.process_index,
            world=world,
        )
        sampling = self.objective.timesteps
        strata = (sampling.strata or settings.images_per_step(world)) if isinstance(sampling, Stratified) else None
        studio = self._studio(components, encoded, ema, tracker)
        self._say_plan(components, encoded, start, steps)
        if start == 0 and accelerator.is_main_process:
            tracker.figure(
                "method", 0, method_figure.method([method_figure.Arm(diagnose(self.native))], headline(self.choices))
            )
        read = batches(encoded, self.captions, sampler, workers=settings.workers, strata=strata, noise=self.noise)
        self._warm_up(unet, encoded, read, tracker, start)
        profiler = self._profiler(tracker, steps - start)
        self.screen.begin(start, steps)
        parts = Training(
            accelerator, unet, update, lr, self.objective, ema,
            profiler.watch(on_device(read, accelerator.device)), meter, tracker, checkpoints,
            functools.partial(self._evaluate, studio), self._report, profiler.step,
        )  # fmt: skip
        with profiler:
            reached = train(settings, parts, start=start, steps=steps, stop=stop)
        self.note.reached(reached, settings.images_per_step(world))
        self.screen.end()
        if reached < steps:
            self.screen.say(f"stopped at step {reached} of {steps}; the same command goes on from there")
            raise Stopped
        if accelerator.is_main_process:
            self._finish(components, encoded, ema.averages(), tracker)
        accelerator.wait_for_everyone()

    def _report(self, step: int, values: dict[str, float]) -> None:
        self.note.reached(step, self.settings.images_per_step(self.accelerator.num_processes))
        self.screen.report(step, values)

    def _warm_up(self, unet: Any, encoded: Encoded, read: DataLoader[Batch], tracker: Tracker, start: int) -> None:
        """Let actions that compile do so before the clock starts."""
        if any(action.compiles for action in self.memory):
            buckets = {ref.placement.bucket for refs in encoded.latents for ref in refs}
            seconds = warm_up(
                self.objective, unet, self.accelerator, read.dataset[0, 0], buckets, self.settings.batch_size
            )
            self.screen.say(f"compiled for {len(buckets)} bucket shapes in {seconds:.0f} s")
            tracker.log(start + 1, {"perf/compile_seconds": seconds})  # trackers know no step 0

    def _profiler(self, tracker: Tracker, steps: int) -> Profiler | NoProfiler:
        if self.cfg.profile is None or not self.accelerator.is_main_process:
            return NoProfiler()
        names = [str(name) for name, node in (self.cfg.get("memory") or {}).items() if "_target_" in node]
        run, memory = self.settings, dict(zip(names, self.memory, strict=True))
        return self.build(
            self.cfg.profile,
            steps=steps,
            dir=self.home.path / "profile",
            device=self.accelerator.device,
            setup=Setup(run.batch_size, run.grad_accum, run.workers, self.precision.autocast, memory),
            show=self.screen.show,
            tracker=tracker,
        )

    def _flops(self, components: Components, encoded: Encoded) -> Callable[[int, int, int], int]:
        """FLOPs of one image's training step by height, width and tokens; counted when first asked for."""
        canvases = {ref.placement.bucket for refs in encoded.latents for ref in refs}

        @functools.cache
        def all_canvases(tokens: int) -> dict[Bucket, int]:
            return by_area(functools.partial(training_flops, components.unet, tokens=tokens), canvases)

        return lambda height, width, tokens: all_canvases(tokens)[Bucket(width, height)]

    def _updating(self, unet: Any) -> tuple[Any, Any, Update]:
        """The prepared UNet, the optimizer or all of them seen as one, and what updates the weights."""
        limit, free = self.settings.max_grad_norm, self.objective.parameter_groups()
        if self.in_backward:
            prepared = self.accelerator.prepare(unet)
            several = UpdateInBackward(self.build(self.cfg.optimizer), unet, limit, free)
            return prepared, several, several
        optimizer = self.build(self.cfg.optimizer, params=[{"params": list(unet.parameters())}, *free])
        keep_layout(optimizer)
        prepared, optimizer = self.accelerator.prepare(unet, optimizer)
        return prepared, optimizer, WholeUpdate(self.accelerator, optimizer, prepared.parameters(), limit)

    def _evaluate(self, studio: Studio, step: int, last: bool) -> dict[str, float]:
        values: dict[str, float] = {}
        due = [evaluator for evaluator in self.evals if last or step % evaluator.every == 0]
        if due and self.accelerator.is_main_process:
            with uncompiled(self.memory):
                for evaluator in due:
                    values |= evaluator.run(step, studio)
        if due:
            self.accelerator.wait_for_everyone()
        return values

    def _studio(self, components: Components, encoded: Encoded, ema: Any, tracker: Tracker) -> Studio:
        device = self.accelerator.device

        def decode(latents: Tensor) -> list[Image.Image]:
            vae = components.vae.to(device)
            images = decode_latents(vae, latents.cpu() * encoded.std + encoded.mean)
            vae.to("cpu")
            return images

        edge = int(self.cfg.native.resolution)
        return Studio(
            denoise=components.unet,
            schedule=self.objective.schedule,
            parameterization=self.objective.parameterization,
            sampling=self.sampling,
            condition=encoded.condition,
            decode=decode,
            ema=ema,
            tracker=tracker,
            encoded=encoded,
            square=Bucket(edge, edge),
            run_dir=self.home.path,
            device=device,
        )

    def _finish(
        self, components: Components, encoded: Encoded, weights: Mapping[str, Tensor], tracker: Tracker
    ) -> None:
        save_pipeline(
            components,
            weights,
            self.native.schedule,
            self.native.parameterization,
            mean=encoded.mean,
            std=encoded.std,
            resolution=int(self.cfg.native.resolution),
            path=self.home.pipeline,
        )
        for grid in sorted((self.home.path / "samples").glob("*.png"))[-1:]:
            tracker.artifact(grid)

    # --- words --------------------------------------------------------------------------------------------------------

    def _say_plan(self, components: Components, encoded: Encoded, start: int, steps: int) -> None:
        settings, world = self.settings, self.accelerator.num_processes
        names = [refs[0].placement.bucket.name for refs in encoded.latents]
        parameters = sum(p.numel() for p in components.unet.parameters())
        skipped, held = len(encoded.index.skipped), len(encoded.index.held_out)
        images = f"{len(names)}" + (f", {held} more held out" if held else "")
        images += f" ({skipped} skipped: {self.home.path / 'skipped.csv'})" if skipped else ""
        per_step = f"{settings.batch_size} x {settings.grad_accum} x {world} = {settings.images_per_step(world)}"
        rows = {
            **self.choices,
            "images": images,
            "buckets": counted(sorted(names)),
            "UNet": f"{parameters:,} parameters on {self.accelerator.device}",
            "raw latents": in_words((encoded.mean, encoded.std)),
            "images/step": f"{per_step} (batch_size x grad_accum x processes)",
            "steps": f"{steps}" + (f", continuing after {start}" if start else ""),
            "results": str(self.home.path),
        }
        self.screen.table("nai_xl", rows)
        self.screen.say(*sentences(self.native))

    def _say_where(self, lines: Any) -> None:
        grids = sorted((self.home.path / "samples").glob("*.png"))[-1:]
        newest = sorted(self.home.checkpoints.glob("step_*"))[-1:]
        self.screen.say(
            *(f"samples      {grid}" for grid in grids),
            *(f"checkpoint   {path}" for path in newest),
            f"pipeline     {self.home.pipeline}   (diffusers: StableDiffusionXLPipeline.from_pretrained)",
            *lines,
        )


def main_job(cfg: DictConfig, choices: dict[str, str]) -> float | None:
    """Train; the run's last val/loss, or else train/loss, for a search to minimise."""
    quiet_libraries()
    job = Job(cfg, choices, config.arm(cfg))
    job.run()
    gc.collect()  # a sweep's next arm may be trained in this process, and must not find this one's model in memory
    return objective(job.home.path)


main = config.entry_point(main_job, sweep=Sweep("nai_xl.train"))

if __name__ == "__main__":
    main()
