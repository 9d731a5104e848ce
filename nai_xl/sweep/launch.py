"""A sweep: every arm in a process of its own; what is finished is left alone, and what fails spares the others.

Hydra composes the arms (hydra/launcher=arms, in hydra_plugins/nai_xl_sweep) and `Sweep.launch` trains them.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from nai_xl import config
from nai_xl.engine.loop import Stop
from nai_xl.errors import UserError, one_line
from nai_xl.record.arm import Arm, ArmRecord, Status, arm_so_far, label
from nai_xl.record.metrics import last_step, last_value, objective
from nai_xl.record.run_dir import RunDirectory
from nai_xl.sweep.board import Board, Row, print_table, tail
from nai_xl.sweep.processes import Running, Task, run_all
from nai_xl.tracker.mlflow.sweep import begin_sweep, end_sweep

Count = Annotated[int, Field(ge=1)]
WORKER_ENDED = re.compile(r"exitcode\s*:\s*(-?\d+)")  # in torchrun's report, the first cause last
# of Hydra's own overrides, those that are the sweep's and not its arms'
SWEEP_ONLY = ("hydra.mode=", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.")


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep asks and how it runs; nothing here changes what an arm learns.

    name: null is the experiment's name, else the swept keys. baseline: the arm that others are compared with, such as
    "schedule=ztsnr,loss=uniform". metrics: those that are compared. arms: where they are no full grid, each one's keys
    and values; what else is swept multiplies them. varied: the swept keys, filled in by Hydra. parallel: arms at a time
    on this machine. processes: of each arm, one on each GPU; null is 1 with distributed=none, else the arm's share of
    the GPUs.
    """

    changes_weights: ClassVar[bool] = False

    name: str | None = None
    question: str | None = None
    baseline: str | None = None
    metrics: Sequence[str] = ()
    arms: Sequence[Mapping[str, Any]] = ()
    varied: Sequence[str] = ()
    parallel: Count = 1
    processes: Count | None = None

    def processes_of(self, cfg: DictConfig, gpus: int) -> int:
        """How many processes train an arm of this config. Raises UserError where they cannot."""
        single = str(cfg.distributed.get("_target_")).endswith(".SingleProcess")
        if self.processes is None:
            return 1 if single else max(1, gpus // self.parallel)
        if self.processes > 1 and single:
            raise UserError(f"sweep.processes={self.processes} with distributed=none; set distributed=ddp")
        if 0 < gpus < self.processes:
            raise UserError(f"sweep.processes={self.processes} is more than this machine's {gpus} GPUs")
        return self.processes


@dataclass(eq=False)
class Member:
    """One arm of the sweep under way, `command` to train it alone, and what has become of it."""

    cfg: DictConfig
    note: ArmRecord
    command: Sequence[str] = ()
    processes: int = 1
    status: str = "not started"
    error: str | None = None
    before: Arm | None = None  # arm.json as the arm's process found it

    @property
    def path(self) -> Path:
        return self.note.home.path

    @property
    def name(self) -> str:
        seed = {"seed": self.note.arm.seed} if "run.seed" in self.cfg.sweep.varied else {}
        return label({**self.note.arm.arm, **seed}) or self.path.name

    def task(self) -> Task:
        return Task(self.command, self.note.home.log, workers=self.processes > 1)

    def row(self) -> Row:
        arm = arm_so_far(self.path) if self.status != "not started" else None
        steps, seconds = (arm.steps, arm.seconds) if arm else (0, 0.0)
        loss = last_value(self.path, "train/loss") if arm else None
        # `python` for this program's own: what a person types, in the environment that is active
        again = shlex.join("python" if part == sys.executable else part for part in self.command)
        return Row(self.name, self.status, steps, seconds, loss, self.path, self.error, again)


@dataclass
class Sweep:
    """The sweeps of one command. `program` is the module that trains an arm."""

    program: str
    members: list[Member] = field(default_factory=list)

    def launch(self, master: DictConfig, composed: Sequence[DictConfig]) -> list[float | UserError | None]:
        """Train the arms that Hydra composed under `master`, less the finished ones. Each one's objective or failure.

        Raises KeyboardInterrupt after a Ctrl-C or SIGTERM, once the arms under way have saved their state, and
        UserError for what is wrong with all of them.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a sweep starts its arms' processes itself: leave torchrun out and set sweep.processes=N")
        common, _, _ = config.opened(composed[0])
        config.check(common, only=["sweep"])
        settings: SweepSettings = config.build(common.sweep)
        gpus = visible_gpus()
        members = [self._member(master, cfg, settings, len(gpus)) for cfg in composed]
        refuse_shared(members)
        distinct = list({member.path: member for member in members}.values())
        self.members += distinct
        due = [member for member in distinct if member.status == "not started"]
        processes = max((member.processes for member in due), default=1)
        if due and (store := mlflow_store(common)) is not None:
            name, question = str(settings.name), settings.question or ""
            shared = [
                key
                for key in settings.varied
                if key != "run.seed" and all(OmegaConf.select(member.cfg, key) is not None for member in distinct)
            ]
            lines = begin_sweep(name, question, settings.varied, settings.metrics, shared=shared, **store)
            print(*lines, sep="\n", flush=True)
        environments = slots(settings.parallel, processes, gpus, len(os.sched_getaffinity(0)))
        with Stop() as stop, Board() as board:
            watching = Watching(board, distinct, due, stop)
            run_all(
                [member.task() for member in due],
                environments,
                stop,
                begun=watching.begun,
                ended=watching.ended,
                watch=watching.watch,
            )
        if stop.asked:
            raise KeyboardInterrupt
        missing = sum(member.status != "FINISHED" for member in distinct)
        failure = UserError(f"{missing} of {len(distinct)} arms failed; the same command again trains only those")
        status = {member.path: member.status for member in distinct}
        return [objective(one.path) if status[one.path] == "FINISHED" else failure for one in members]

    def tell(self) -> None:
        """The table of all arms so far; nothing outside of a sweep."""
        members, self.members = self.members, []
        if members:
            asked = members[0].cfg.sweep
            title = f"sweep {asked.name}" + (f": {asked.question}" if asked.question else "")
            print_table(title, [member.row() for member in members])
            if (store := mlflow_store(members[0].cfg)) is not None:
                print(*end_sweep([member.path for member in members], **store), sep="\n", flush=True)

    def _member(self, master: DictConfig, composed: DictConfig, settings: SweepSettings, gpus: int) -> Member:
        """The arm, finished or refused already where it is."""
        cfg, choices, overrides = config.opened(composed)
        home = RunDirectory(config.run_dir(cfg, choices))
        member = Member(cfg, ArmRecord(home, arm_of(cfg, config.arm(cfg, overrides))))
        found = arm_so_far(home.path)
        run = cfg.run
        if found and home.pipeline.is_dir() and found.finished(max_images=run.max_images, epochs=run.epochs):
            member.note.adopt(found)
            member.status = "FINISHED"
            return member
        try:
            # names and types; what else is wrong is told by the arm, which may end as it likes
            config.check(cfg, choices=choices)
            member.processes = settings.processes_of(cfg, gpus)
        except UserError as error:
            member.status, member.error = "FAILED", one_line(error)
            member.note.end("FAILED", member.error)
            print(f"error: {member.name}: {member.error}", file=sys.stderr)
        member.command = [*started_by(member.processes), self.program, *hydra_flags(master), *overrides]
        member.command += ["hydra.mode=RUN"] if choices.get("experiment") else []
        return member


@dataclass
class Watching:
    """Follows the processes of the arms that are `due`: keeps each one's status, and tells it."""

    board: Board
    members: Sequence[Member]
    due: Sequence[Member]
    stop: Stop
    told: bool = False

    def __post_init__(self) -> None:
        finished = sum(member.status == "FINISHED" for member in self.members)
        if finished:
            self.board.say(f"{finished} of {len(self.members)} arms are finished already, {len(self.due)} to train")

    def begun(self, running: Running) -> None:
        member = self.due[running.number]
        member.status, member.before = "RUNNING", arm_so_far(member.path)
        self._say(member, f"begins, output in {running.task.log}")

    def ended(self, running: Running, code: int) -> None:
        member = self.due[running.number]
        found = arm_so_far(member.path)
        if code == 0 and found and found.status == "FINISHED":
            member.status = "FINISHED"
        elif found and found != member.before and found.status in ("FAILED", "STOPPED"):
            member.status, member.error = found.status, found.error
        else:
            self._told_by_its_end(member, running, code)
        loss = last_value(member.path, "train/loss")
        how = f": {member.error}" if member.error else "" if loss is None else f", train/loss {loss:.4f}"
        self._say(member, f"{member.status} after {running.seconds:.0f} s{how}")

    def _told_by_its_end(self, member: Member, running: Running, code: int) -> None:
        """Record what became of an arm whose process could not do it."""
        status: Status = "STOPPED" if running.asked else "FAILED"
        reason = None if running.asked else why(code, tail(running.task.log, running.log_began))
        member.status, member.error = status, reason
        run = member.cfg.run
        member.note.reached(last_step(member.path), run.batch_size * run.grad_accum * member.processes)
        member.note.began = running.began
        member.note.end(status, member.error)

    def watch(self, running: Sequence[Running]) -> None:
        if self.stop.asked and running and not self.told:
            self.told = True
            self.board.say("stopping: the arms under way save their state; Ctrl-C again ends them at once")
        self.board.watch([(self.due[o.number].name, o.seconds, o.task.log, o.log_began) for o in running])

    def _say(self, member: Member, words: str) -> None:
        self.board.say(f"[{self.members.index(member) + 1}/{len(self.members)}] {member.name}: {words}")


# --- arms -------------------------------------------------------------------------------------------------------------


def arm_of(cfg: DictConfig, arm: Mapping[str, object]) -> Arm:
    """The arm that a config describes, as its arm.json begins."""
    return Arm(cfg.sweep.name, dict(arm), cfg.run.seed, config.signature(cfg), epochs=cfg.run.epochs)


def mlflow_store(cfg: DictConfig) -> dict[str, str] | None:
    """The store and experiment that arms report to, if it is MLflow that they report to."""
    if not str(cfg.tracker.get("_target_")).endswith(".MlflowTracker"):
        return None
    return {key: str(cfg.tracker[key]) for key in ("uri", "experiment") if cfg.tracker.get(key)}


def refuse_shared(members: Sequence[Member]) -> None:
    """Arms that differ in nothing that a run is told by would train in one directory, each against the other."""
    first: dict[Path, Member] = {}
    for member in members:
        other = first.setdefault(member.path, member)
        if other.cfg != member.cfg:
            raise UserError(
                f"{other.name} and {member.name} are one run, {member.path}: what they differ in does not change what "
                "is learned. To have two, give them names: name='run_${run.max_images}', for example"
            )


def started_by(processes: int) -> list[str]:
    """The beginning of an arm's command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m"]


def hydra_flags(master: DictConfig) -> list[str]:
    """What of a sweep's command line is Hydra's own and holds for each arm too."""
    hydra = master.hydra
    flags = [] if hydra.job.config_name == "train" else ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        flags += ["--config-dir", source.path] if source.provider == "command-line" else []
    return flags + [override for override in hydra.overrides.hydra if not override.startswith(SWEEP_ONLY)]


def why(code: int, log: str) -> str:
    """Why a process ended that could not tell itself: its signal, or the last error in its output."""
    workers = WORKER_ENDED.findall(log)
    cause = int(workers[-1]) if workers else code
    if cause < 0:
        return f"killed by signal {-cause}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return [*lines, *errors][-1].removeprefix("error: ") if lines else f"exit status {code}"


# --- the machine ------------------------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The names of this process's GPUs, as CUDA_VISIBLE_DEVICES lists them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def slots(parallel: int, processes: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """What each of the places for an arm adds to the environment: its GPUs, and its share of the cores.

    With fewer GPUs than arms at a time, several arms share one. OMP_NUM_THREADS is left as it is where it is set, and
    where a single process has the whole machine.
    """
    added: dict[str, str] = {"PYTHONUNBUFFERED": "1"}
    if parallel * processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, cores // (parallel * processes)))
    places = []
    for number in range(parallel):
        own = [gpus[(number * processes + i) % len(gpus)] for i in range(processes)] if gpus else []
        places.append(added | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if gpus else {}))
    return places
