"""A sweep: every arm in a process of its own; what is finished is left alone, and what fails spares the others.

Hydra composes the arms (hydra/launcher=arms, in hydra_plugins/nai_xl_sweep) and `Sweep.launch` trains them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.judging.comparable import leading
from nai_xl.distributed.launch import refuse_half_a_launch, several
from nai_xl.engine.stop import Stop
from nai_xl.errors import STOPPED_STATUS, Stopped, UserError
from nai_xl.record.arm import Status, arm_so_far
from nai_xl.record.metrics import last_step, last_value, objective
from nai_xl.sweep.board import Board, print_table, tail
from nai_xl.sweep.machine import slots, visible_gpus
from nai_xl.sweep.member import Compose, Member, member_of, path_of, refuse_shared
from nai_xl.sweep.processes import Running, run_all, why
from nai_xl.sweep.settings import SweepSettings
from nai_xl.tracker.sweep import SweepTracker


@dataclass
class Sweep:
    """The sweeps of one command. `python -m module` trains an arm."""

    module: str
    members: list[Member] = field(default_factory=list)
    metrics: Sequence[str] = ()  # what the arms are compared by, the first of them in the table
    tracker: SweepTracker = field(default_factory=SweepTracker)
    told: list[str] = field(default_factory=list)  # by the tracker, once for all rounds

    def launch(
        self, master: DictConfig, composed: Sequence[DictConfig], compose: Compose
    ) -> list[float | UserError | None]:
        """Train the arms that Hydra composed under `master`, except the finished ones. Returns the objective of each,
        or its failure; None for an arm that was decided before this seed's turn. `compose` makes the configs of further
        seeds.

        Raises Stopped after a signal that asks for it, once the arms under way have saved their state, and
        UserError for a mistake that all of them share.
        """
        refuse_half_a_launch(several=False)
        if several():
            raise UserError("a sweep starts its arms' processes itself: leave torchrun out and set sweep.processes=N")
        common, _, _ = config.opened(composed[0])
        config.check(common, only=["sweep", "tracker"])
        settings: SweepSettings = config.build(common.sweep)
        self.metrics = settings.metrics or leading(common, settings.varied)
        self.tracker = sweep_tracker(common)
        before = len(self.members)
        if settings.in_rounds:
            from nai_xl.sweep.rounds import Rounds  # with scipy, which takes each arm a second to import

            Rounds(composed, settings, compose).run(lambda batch: self._train(master, batch, settings))
        else:
            self._train(master, composed, settings)
        members = {member.path: member for member in self.members[before:]}
        missing = sum(member.status != "FINISHED" for member in members.values())
        failure = UserError(f"{missing} of {len(members)} arms failed; the same command again trains only those")
        if settings.in_rounds and missing:
            raise failure  # it may be of a seed that Hydra has not composed
        gpus = len(visible_gpus())
        return [outcome(members.get(path_of(one, settings, gpus)), failure) for one in composed]

    def _train(self, master: DictConfig, composed: Sequence[DictConfig], settings: SweepSettings) -> list[Member]:
        """Train these arms, except the finished ones, and return them."""
        gpus = visible_gpus()
        members = [
            member_of(self.module, master, cfg, settings, len(gpus), place=place)
            for place, cfg in enumerate(composed, start=len(self.members))
        ]
        refuse_shared(members)
        distinct = list({member.path: member for member in members}.values())
        self.members += distinct
        for member in [member for member in distinct if member.status == "not started"][:1]:
            member.record.home.create()  # output_dir is the same mistake for all
        if any(member.status == "not started" for member in distinct):
            lines = self.tracker.begin(
                str(settings.name),
                settings.question or "",
                settings.varied,
                self.metrics,
                shared=shared_keys(settings, self.members),
            )
            show([line for line in lines if line not in self.told])
            self.told += lines
        train(distinct, settings.parallel, gpus, next(iter(self.metrics), None))
        return members

    def tell(self) -> None:
        """Print the table of all arms so far; nothing outside of a sweep."""
        members, self.members = self.members, []
        if members:
            asked = members[0].cfg.sweep
            title = f"sweep {asked.name}" + (f": {asked.question}" if asked.question else "")
            metric = next(iter(self.metrics), None)
            print_table(title, [member.row(metric) for member in members], metric)
            show(self.tracker.end([member.path for member in members]))


def outcome(member: Member | None, failure: UserError) -> float | UserError | None:
    """What Hydra is told of an arm."""
    if member is None:
        return None
    return objective(member.path) if member.status == "FINISHED" else failure


def show(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def sweep_tracker(cfg: DictConfig) -> SweepTracker:
    """What follows the whole sweep, as the arms' tracker has it. Raises UserError for a tracker that cannot say."""
    target: Any = config.locate(str(cfg.tracker._target_), tuple(cfg.plugins))
    content: Any = OmegaConf.to_container(cfg.tracker, resolve=True)
    settings = {key: value for key, value in content.items() if not key.startswith("_")}
    if not hasattr(target, "of_sweep"):  # no class that derives from a tracker, as a plug-in may have it
        name = cfg.tracker._target_
        raise UserError(
            f"tracker {name} cannot be swept; derive it from nai_xl.tracker.jsonl.NoTracker, or set tracker=jsonl"
        )
    tracker: SweepTracker = target.of_sweep(**settings)
    return tracker


def shared_keys(settings: SweepSettings, members: Sequence[Member]) -> list[str]:
    """The swept keys, without the seed, that every arm has a value for."""
    keys = [key for key in settings.varied if key != "run.seed"]
    return [key for key in keys if all(OmegaConf.select(member.cfg, key) is not None for member in members)]


def train(members: Sequence[Member], parallel: int, gpus: Sequence[str], metric: str | None) -> None:
    """Train the arms that are not started, `parallel` at a time, and tell the `metric` of each. Raises
    Stopped when asked to stop.
    """
    due = [member for member in members if member.status == "not started"]
    processes = max((member.processes for member in due), default=1)
    environments = slots(parallel, processes, gpus, len(os.sched_getaffinity(0)))
    with Stop(deferred=True) as stop, Board() as board:
        watching = Watching(board, members, due, stop, metric)
        programs = [member.program() for member in due]
        run_all(programs, environments, stop, begun=watching.begun, ended=watching.ended, watch=watching.watch)
    if stop.asked:
        raise Stopped


@dataclass
class Watching:
    """Follows the processes of the arms that are `due`: keeps each one's status, and tells it."""

    board: Board
    members: Sequence[Member]
    due: Sequence[Member]
    stop: Stop
    metric: str | None = None
    told: bool = False

    def __post_init__(self) -> None:
        finished = sum(member.status == "FINISHED" for member in self.members)
        if finished:
            self.board.say(f"{finished} of {len(self.members)} arms are finished already, {len(self.due)} to train")

    def begun(self, running: Running) -> None:
        member = self.due[running.number]
        member.status, member.before = "RUNNING", arm_so_far(member.path)
        self._say(member, f"begins, output in {running.program.log}")

    def ended(self, running: Running, code: int) -> None:
        member = self.due[running.number]
        found = arm_so_far(member.path)
        if code == 0 and found and found.status == "FINISHED":
            member.status = "FINISHED"
        elif found and found != member.before and found.status in ("FAILED", "STOPPED"):
            member.status, member.error = found.status, found.error
        else:
            self._record_end(member, running, code)
        value = last_value(member.path, self.metric) if self.metric else None
        how = f": {member.error}" if member.error else "" if value is None else f", {self.metric} {value:.4f}"
        self._say(member, f"{member.status} after {running.seconds:.0f} s{how}")

    def _record_end(self, member: Member, running: Running, code: int) -> None:
        """Record what became of an arm whose process could not do so."""
        stopped = running.asked or code == STOPPED_STATUS
        status: Status = "STOPPED" if stopped else "FAILED"
        reason = None if stopped else why(code, tail(running.program.log, running.log_began))
        member.status, member.error = status, reason
        run = member.cfg.run
        member.record.reached(last_step(member.path), run.batch_size * run.grad_accum * member.processes)
        member.record.began = running.began
        member.record.end(status, member.error)

    def watch(self, running: Sequence[Running]) -> None:
        if self.stop.asked and running and not self.told:
            self.told = True
            self.board.say("stopping: the arms under way save their state; Ctrl-C again ends them at once")
        self.board.watch([(self.due[o.number].name, o.seconds, o.program.log, o.log_began) for o in running])

    def _say(self, member: Member, words: str) -> None:
        self.board.say(f"[{self.members.index(member) + 1}/{len(self.members)}] {member.name}: {words}")
