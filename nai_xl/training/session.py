"""One training of one run: from what was built to what is delivered."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nai_xl import config
from nai_xl.adapter.trainable import Trainable
from nai_xl.config.spec import Spec
from nai_xl.data.index import Index
from nai_xl.distributed import activity
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.checkpoint import PaceState
from nai_xl.engine.console import Screen
from nai_xl.engine.hooks import Evaluate, KeepBest, MarkReported, Profile, Report, Save, Surroundings
from nai_xl.engine.loop import Hook, Training, train
from nai_xl.engine.precompile import precompile
from nai_xl.engine.prefetch import on_device
from nai_xl.engine.stop import Stop
from nai_xl.errors import Stopped, UserError
from nai_xl.files import writing
from nai_xl.interfaces import Checkpointer, Tracker
from nai_xl.memory.compile import uncompiled
from nai_xl.profiler.advice import Setup
from nai_xl.profiler.profiler import NoProfiler, Profiler
from nai_xl.record.arm import ArmRecord
from nai_xl.record.config import write_config
from nai_xl.record.metrics import lost_rows
from nai_xl.record.pace import Pace, pace_of
from nai_xl.record.progress import ProgressRecord
from nai_xl.record.provenance import git_commit
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import TrainingData
from nai_xl.tracker.jsonl import NoTracker
from nai_xl.training.drift import Drift, refuse_unlike
from nai_xl.training.restoring import Restoring


@dataclass
class Session:
    """This process's part in one run. choices: group -> option. environment: what to tell of it."""

    spec: Spec
    choices: Mapping[str, str]
    home: RunDirectory
    strategy: Strategy
    note: ArmRecord
    stop: Stop
    environment: Sequence[str] = ()
    screen: Screen = field(init=False)
    progress: ProgressRecord = field(init=False)
    pace: PaceState = field(init=False)

    def __post_init__(self) -> None:
        self.progress = ProgressRecord(self.home, writes=self.strategy.first)
        run, world = self.spec.run, self.strategy.world
        self.screen = Screen(silent=not self.strategy.first)
        self.pace = PaceState(Pace(run.images_per_step(world), run.chunk_size(world)), run.batch_size * world)

    def run(self, index: Index) -> None:
        """Train, or continue, or say that there is nothing left to do. The caller holds the run's lock."""
        spec, strategy, home = self.spec, self.strategy, self.home
        refuse_unlike(index, strategy)
        steps = spec.run.steps(len(index.items), strategy.world)
        self.pace.pace.refuse_other(pace_of(home.path), self.pace.wide)
        checkpoints = spec.checkpoint(dir=home.checkpoints, keep=spec.run.keep_checkpoints, strategy=strategy)
        found = checkpoints.latest_step()
        # as the first rank finds it: others may have looked before it held the lock, while another process trained
        mine = (found, self.progress.has_delivered(steps), Drift.since(home, index))
        done, delivered, drift = strategy.gather_objects([mine])[0]
        if done >= steps and delivered:
            self._say_finished(done, steps, drift)
            return
        self._refuse_shorter(done, steps)
        drift.refuse(index)
        continued = home.config.is_file()
        if strategy.first:
            self.note.begin()
            home.tidy()
            if not continued:
                write_config(home.path, spec.cfg)
        activity.doing("reading the weights")
        network = spec.task.load(spec.model)
        activity.doing("preparing the data")
        data = spec.task.prepare(index, spec.cache, strategy, home)
        if strategy.first:
            self.screen.say(*drift.accept(home, index, data.index, done))
            data.write(home)
            drift.note(home, index)
        with checkpoints, self._reporting(index) as tracker:
            activity.doing("building the training")
            trainable = spec.adapter(network)
            self._act_on(trainable)
            state = spec.assemble(trainable, strategy, data, steps)
            restoring = Restoring(spec, home, self.screen, self.progress, self.pace, checkpoints, state, data)
            start, unreported = restoring.begin()
            if strategy.first and continued:  # not before: what is refused leaves the record as it was
                known = start if unreported is None else start - 1
                self.screen.say(*lost_rows(home.path, known, spec.run.log_every))
                write_config(home.path, spec.cfg)
            tracker.artifact(home.config)
            self._announce(data, tracker, start, steps, state.remarks)
            with self._written() as looks:
                reached = self._loop(data, state, tracker, checkpoints, looks, start, steps, unreported)
            if reached < steps:
                raise Stopped(together=True)
            activity.doing("writing the pipeline")
            weights = state.delivered()
            if strategy.first:
                with writing(home.pipeline, (OSError, SafetensorError)):
                    spec.task.deliver(data, weights, home.pipeline)
                for grid in home.newest_samples():
                    tracker.artifact(grid)
                self.progress.delivered(steps)
            strategy.wait()
        self._say_where(tracker.where())

    def _refuse_shorter(self, done: int, steps: int) -> None:
        """Raises UserError for a run that is to be shorter than it is already."""
        if done > steps:
            run = self.spec.run
            asked = f"run.epochs={run.epochs}" if run.max_images is None else f"run.max_images={run.max_images}"
            raise UserError(
                f"{asked} is {steps} steps, and this run has {done} already; give at least the "
                f"{done * self.pace.pace.images_per_step} images that it has seen to continue it, or name=NAME for a "
                "shorter run"
            )

    def _act_on(self, trainable: Trainable) -> None:
        """Apply the memory actions. Raises UserError for one that replaces what is trained."""
        for action in self.spec.memory:
            action.apply(trainable.module)
            there = {id(parameter) for parameter in trainable.module.parameters()}
            if any(id(parameter) not in there for parameter in trainable.parameters.values()):
                name = type(action).__name__
                raise UserError(f"memory: {name} replaces parameters that are trained; leave it out of 'memory=[...]'")

    def _loop(
        self,
        data: TrainingData,
        state: State,
        tracker: Tracker,
        checkpoints: Checkpointer,
        looks: RunDirectory,
        start: int,
        steps: int,
        unreported: Mapping[str, float] | None,
    ) -> int:
        """The step reached. looks: where evaluators write."""
        spec, strategy = self.spec, self.strategy
        read = data.batches(spec.run, strategy, start=start)
        compiled = self._precompile(data, state)
        profiler = self._profiler(tracker, steps - start)
        self.screen.begin(start, steps)
        studio = spec.task.studio(data, state, tracker, looks)
        save = Save(checkpoints, spec.run.checkpoint_every, saved=start)
        hooks: list[Hook] = [
            Profile(profiler),
            *spec.hooks,
            save,
            Evaluate(spec.evaluators, studio, strategy, partial(self._interruptible, state)),
            *self._keeping_best(save),
            Report(tracker, self.note, self.screen, spec.run.images_per_step(strategy.world), compiled),
            MarkReported(self.progress, save),
        ]
        for hook in spec.hooks:
            hook.begin(Surroundings(self.home.path, state, tracker, self.screen.say, start, steps))
        batches = profiler.watch(on_device(read, strategy.device))
        parts = Training(state, spec.task.loss, batches, hooks)
        try:
            with profiler:
                reached = train(spec.run, parts, start=start, steps=steps, stop=self.stop, unreported=unreported)
        except Stopped:
            reached = self.note.arm.steps
            self.screen.say(
                f"stopped while evaluating at step {reached} of {steps}; the same command goes on from there"
            )
            raise
        finally:
            self.screen.end()  # an error gets a line of its own
        if reached < steps:
            self.screen.say(f"stopped at step {reached} of {steps}; the same command goes on from there")
        return reached

    def _keeping_best(self, save: Save) -> list[Hook]:
        """The hook of checkpoint.best, if that is set."""
        if self.spec.best is None:
            return []
        metric, direction, owner = self.spec.best
        found = save.checkpoints.best_value()
        return [KeepBest(save, metric, direction, owner, self.spec.evaluators, self.strategy, found)]

    @contextmanager
    def _interruptible(self, state: State) -> Iterator[None]:
        """Around evaluation: nothing is compiled, and a signal ends it before the next pass."""
        with uncompiled(self.spec.memory), self.stop.between_passes(state.trainable.module, self.strategy):
            yield

    def _precompile(self, data: TrainingData, state: State) -> dict[str, float]:
        """Let actions that compile do so before the clock starts. What there is to report of it."""
        if not self.spec.compiles:
            return {}
        shapes = list(data.one_of_each_shape(self.spec.run.batch_size))
        first = next(iter(state.trainable.parameters.values()))
        seconds = precompile(self.spec.task.loss, state.module, first, self.strategy, shapes)
        self.screen.say(f"compiled for {len(shapes)} bucket shapes in {seconds:.0f} s")
        return {"perf/compile_seconds": seconds}

    def _profiler(self, tracker: Tracker, steps: int) -> Profiler | NoProfiler:
        cfg, run = self.spec.cfg, self.spec.run
        if cfg.profile is None or not self.strategy.first:
            return NoProfiler()
        chosen = [str(name) for name, node in (cfg.get("memory") or {}).items() if "_target_" in node]
        memory = dict(zip(chosen, self.spec.memory, strict=True))
        profiler: Profiler = config.build(
            cfg.profile,
            tuple(cfg.plugins),
            steps=steps,
            dir=self.home.profile,
            device=self.strategy.device,
            setup=Setup(run.batch_size, run.grad_accum, run.workers, self.spec.precision.autocast, memory),
            show=self.screen.show,
            tracker=tracker,
        )
        return profiler

    @contextmanager
    def _written(self) -> Iterator[RunDirectory]:
        """Where evaluators write: the run's directory for the first rank, for others one that is thrown away."""
        if self.strategy.first:
            yield self.home
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield RunDirectory(Path(scratch))

    @contextmanager
    def _reporting(self, index: Index) -> Iterator[Any]:
        """What the first rank reports to, and the others do not."""
        spec, strategy = self.spec, self.strategy
        tracker = spec.tracker(run_dir=self.home.path) if strategy.first else NoTracker()
        try:
            with tracker:
                chosen = {**self.choices, **config.flat(spec.cfg), "data_fingerprint": index.fingerprint()}
                tracker.params(chosen, {"seed": str(spec.run.seed), "git_commit": git_commit()})
                yield tracker
        except Stopped as stopped:
            if stopped.together:  # torchrun ends all processes soon after the first; the tracker's is done now
                strategy.wait()
            raise

    # --- words --------------------------------------------------------------------------------------------------------

    def _announce(self, data: TrainingData, tracker: Tracker, start: int, steps: int, remarks: Sequence[str]) -> None:
        """The table, the remarks and the figure that a run begins with."""
        task, run, world = self.spec.task, self.spec.run, self.strategy.world
        per_step = f"{run.batch_size} x {run.grad_accum} x {world} = {run.images_per_step(world)}"
        store = config.member(self.spec.cfg.tracker, "described", tuple(self.spec.cfg.plugins))
        rows = {
            **self.choices,
            **({"tracker": f"{self.choices.get('tracker', '')}: {store()}"} if store else {}),
            **data.described(),
            **task.described(),
            "images/step": f"{per_step} (batch_size x grad_accum x processes)",
            "steps": f"{steps}" + (f", continuing after {start}" if start else ""),
            "results": str(self.home.path),
        }
        if self.environment:
            rows["environment"] = "\n".join(self.environment)
        self.screen.table("nai_xl", rows)
        self.screen.say(*data.index.remarks, *task.remarks(), *remarks)
        if world == 1 and self.spec.distributed.several:
            option = self.choices.get("distributed", "ddp")
            self.screen.say(
                f"distributed={option} runs in this one process: start several with torchrun --nproc-per-node=N"
            )
        if start == 0 and self.strategy.first and not self.spec.cfg.sweep.name:
            self._say_kin(run.batch_size * world)
        if start == 0 and self.strategy.first:
            for name, figure in (("method", task.figure(self.choices)), ("canvases", data.figure())):
                if figure:
                    tracker.figure(name, 0, figure)

    def _say_kin(self, wide: int) -> None:
        """That a run is the same but for a default of an earlier version, or an unfinished one but for its pace: most
        likely, another number of processes trained it.
        """
        if former := config.begun_with_former(self.spec.cfg, self.choices):
            path, overrides = former
            self.screen.say(f"{path} is this run with the defaults of an earlier version; {overrides} continues it")
        for path, pace in config.unfinished_kin(self.spec.cfg, self.home.path).items():
            accum, rest = divmod(pace.images_per_step, wide)
            how = "" if rest or not accum else f"; run.grad_accum={accum} run.chunk={pace.chunk} continues that one"
            self.screen.say(
                f"{path} is the same run with {pace.images_per_step} images a step in chunks of {pace.chunk}; this one "
                f"begins anew with {self.pace.pace.images_per_step} in chunks of {self.pace.pace.chunk}{how}"
            )

    def _say_finished(self, done: int, steps: int, drift: Drift) -> None:
        self.note.seen_finished(done, self.pace.pace.images_per_step)
        more = f", more than the {steps} asked for; name=NAME begins a shorter one" if done > steps else ""
        longer = "continues it" if config.open_ended(self.spec.cfg) else "with this lr is another run"
        self.screen.say(f"finished: this run has {done} steps{more}; a larger run.max_images {longer}")
        self.screen.say(*drift.said_of_finished())
        self._say_where(())

    def _say_where(self, lines: Sequence[str]) -> None:
        newest = sorted(path for path in self.home.checkpoints.glob("step_*") if not path.suffix)[-1:]
        self.screen.say(
            *(f"samples      {grid}" for grid in self.home.newest_samples()),
            *(f"checkpoint   {path}" for path in newest),
            f"pipeline     {self.home.pipeline}   ({self.spec.task.delivered})",
            *lines,
        )
