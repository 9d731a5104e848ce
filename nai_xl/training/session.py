"""One training of one run: from what was built to what is delivered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nai_xl import config
from nai_xl.adapter.trainable import Trainable
from nai_xl.config.spec import Spec
from nai_xl.data.index import Index
from nai_xl.distributed import activity
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.checkpoint import Pace
from nai_xl.engine.console import Screen
from nai_xl.engine.hooks import Evaluate, Profile, Report, Save
from nai_xl.engine.loop import Training, train
from nai_xl.engine.precompile import precompile
from nai_xl.engine.prefetch import on_device
from nai_xl.engine.stop import Stop
from nai_xl.errors import Stopped, UserError
from nai_xl.interfaces import Checkpointer, Tracker
from nai_xl.memory.compile import uncompiled
from nai_xl.profiler.advice import Setup
from nai_xl.profiler.profiler import NoProfiler, Profiler
from nai_xl.record.arm import ArmRecord
from nai_xl.record.config import write_config
from nai_xl.record.provenance import git_commit
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import TrainingData
from nai_xl.tracker.jsonl import NoTracker


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

    def __post_init__(self) -> None:
        self.screen = Screen(silent=not self.strategy.first)

    def run(self, index: Index) -> None:
        """Train, or continue, or say that there is nothing left to do. The caller holds the run's lock."""
        spec, strategy, home = self.spec, self.strategy, self.home
        steps = spec.run.steps(len(index.items), strategy.world)
        checkpoints = spec.checkpoint(dir=home.checkpoints, keep=spec.run.keep_checkpoints, strategy=strategy)
        if checkpoints.latest_step() >= steps and home.pipeline.is_dir():
            self._say_finished(checkpoints.latest_step(), steps)
            return
        if strategy.first:
            self.note.begin()
            write_config(home.path, spec.cfg)
        activity.doing("reading the weights")
        network = spec.task.load(spec.model)
        activity.doing("preparing the data")
        data = spec.task.prepare(index, spec.cache, strategy, home)
        if strategy.first:
            data.write(home)
        with self._reporting(index) as tracker:
            activity.doing("building the training")
            trainable = spec.adapter(network)
            self._act_on(trainable)
            state = spec.assemble(trainable, strategy, data, steps)
            start = self._restored(checkpoints, state)
            self._announce(data, tracker, start, steps)
            if self._loop(data, state, tracker, checkpoints, start, steps) < steps:
                raise Stopped(together=True)
            activity.doing("writing the pipeline")
            weights = state.averages()
            if strategy.first:
                spec.task.deliver(data, trainable.deliver(weights), home.pipeline)
                for grid in home.newest_samples():
                    tracker.artifact(grid)
            strategy.wait()
        self._say_where(tracker.where())

    def _act_on(self, trainable: Trainable) -> None:
        """Apply the memory actions. Raises UserError for one that replaces what is trained."""
        for action in self.spec.memory:
            action.apply(trainable.module)
            there = {id(parameter) for parameter in trainable.module.parameters()}
            if any(id(parameter) not in there for parameter in trainable.parameters.values()):
                name = type(action).__name__
                raise UserError(f"memory: {name} replaces parameters that are trained; leave it out of 'memory=[...]'")

    def _restored(self, checkpoints: Checkpointer, state: State) -> int:
        """Bind what a checkpoint holds, and go back to the newest: the step at which it was made."""
        run, world = self.spec.run, self.strategy.world
        pace = Pace(run.images_per_step(world), run.chunk_size(world))
        checkpoints.bind(pace=pace, **self.spec.task.stateful(), **state.stateful())
        return checkpoints.load_latest()

    def _loop(
        self,
        data: TrainingData,
        state: State,
        tracker: Tracker,
        checkpoints: Checkpointer,
        start: int,
        steps: int,
    ) -> int:
        """The step reached."""
        spec, strategy = self.spec, self.strategy
        read = data.batches(spec.run, strategy, start=start)
        self._precompile(data, state, tracker, start)
        profiler = self._profiler(tracker, steps - start)
        self.screen.begin(start, steps)
        studio = spec.task.studio(data, state, tracker, self.home)
        hooks = [
            Profile(profiler),
            Save(checkpoints, spec.run.checkpoint_every, saved=start),
            Evaluate(spec.evals, studio, strategy, partial(self._interruptible, state)),
            Report(tracker, self.note, self.screen, spec.run.images_per_step(strategy.world)),
        ]
        batches = profiler.watch(on_device(read, strategy.device))
        parts = Training(state, spec.task.loss, batches, hooks)
        try:
            with profiler:
                reached = train(spec.run, parts, start=start, steps=steps, stop=self.stop)
        except Stopped:
            reached = self.note.arm.steps
            self.screen.say(
                f"stopped while evaluating at step {reached} of {steps}; the same command goes on from there"
            )
            raise
        if reached < steps:
            self.screen.say(f"stopped at step {reached} of {steps}; the same command goes on from there")
        return reached

    @contextmanager
    def _interruptible(self, state: State) -> Iterator[None]:
        """Around evaluation: nothing is compiled, and a signal ends it before the next pass."""
        with uncompiled(self.spec.memory), self.stop.between_passes(state.trainable.module, self.strategy):
            yield

    def _precompile(self, data: TrainingData, state: State, tracker: Tracker, start: int) -> None:
        """Let actions that compile do so before the clock starts."""
        if self.spec.compiles:
            shapes = list(data.one_of_each_shape(self.spec.run.batch_size))
            first = next(iter(state.trainable.parameters.values()))
            seconds = precompile(self.spec.task.loss, state.module, first, self.strategy, shapes)
            self.screen.say(f"compiled for {len(shapes)} bucket shapes in {seconds:.0f} s")
            tracker.log(start + 1, {"perf/compile_seconds": seconds})  # trackers know no step 0

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
    def _reporting(self, index: Index) -> Iterator[Any]:
        """What the first rank reports to, and the others do not."""
        spec, strategy = self.spec, self.strategy
        tracker = spec.tracker(run_dir=self.home.path) if strategy.first else NoTracker()
        try:
            with tracker:
                chosen = {**self.choices, **config.flat(spec.cfg), "data_fingerprint": index.fingerprint()}
                tracker.params(chosen, {"seed": str(spec.run.seed), "git_commit": git_commit()})
                tracker.artifact(self.home.config)
                yield tracker
        except Stopped as stopped:
            if stopped.together:  # torchrun ends all processes soon after the first; the tracker's is done now
                strategy.wait()
            raise

    # --- words --------------------------------------------------------------------------------------------------------

    def _announce(self, data: TrainingData, tracker: Tracker, start: int, steps: int) -> None:
        """The table, the remarks and the figure that a run begins with."""
        task, run, world = self.spec.task, self.spec.run, self.strategy.world
        per_step = f"{run.batch_size} x {run.grad_accum} x {world} = {run.images_per_step(world)}"
        rows = {
            **self.choices,
            **data.described(),
            **task.described(),
            "images/step": f"{per_step} (batch_size x grad_accum x processes)",
            "steps": f"{steps}" + (f", continuing after {start}" if start else ""),
            "results": str(self.home.path),
        }
        if self.environment:
            rows["environment"] = "\n".join(self.environment)
        self.screen.table("nai_xl", rows)
        self.screen.say(*task.remarks())
        if world == 1 and self.spec.distributed.several:
            option = self.choices.get("distributed", "ddp")
            self.screen.say(
                f"distributed={option} runs in this one process: start several with torchrun --nproc-per-node=N"
            )
        if start == 0 and self.strategy.first and (figure := task.figure(self.choices)):
            tracker.figure("method", 0, figure)

    def _say_finished(self, done: int, steps: int) -> None:
        self.note.reached(done, self.spec.run.images_per_step(self.strategy.world))
        more = f", more than the {steps} asked for; name=NAME begins a shorter one" if done > steps else ""
        longer = "continues it" if config.open_ended(self.spec.cfg) else "with this lr is another run"
        self.screen.say(f"finished: this run has {done} steps{more}; a larger run.max_images {longer}")
        self._say_where(())

    def _say_where(self, lines: Sequence[str]) -> None:
        newest = sorted(self.home.checkpoints.glob("step_*"))[-1:]
        self.screen.say(
            *(f"samples      {grid}" for grid in self.home.newest_samples()),
            *(f"checkpoint   {path}" for path in newest),
            f"pipeline     {self.home.pipeline}   ({self.spec.task.delivered})",
            *lines,
        )
