"""A sweep in rounds: seeds are added only to the arms that need them, with a planned look after each round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig

from nai_xl import config
from nai_xl.compare.answered import answered
from nai_xl.compare.arguments import Request
from nai_xl.compare.arms import ArmRuns, find_baseline
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.judging.verdicts import ONE_SEED, TWO_SEEDS, UNDECIDED
from nai_xl.compare.runs.naming import word
from nai_xl.compare.selection import select
from nai_xl.compare.statistics.spending import LEAST_SEEDS, Plan, plan_of
from nai_xl.compare.wording import said
from nai_xl.errors import UserError
from nai_xl.sweep.member import Compose, Member
from nai_xl.sweep.settings import SweepSettings

OPEN = (UNDECIDED, ONE_SEED, TWO_SEEDS)  # what further seeds may change


@dataclass(eq=False)
class Contender:
    """One arm, whatever the seed. `members`: its runs so far. `due`: whether it gets further seeds."""

    overrides: Sequence[str]
    arm: ArmRuns  # without runs: label and choices alone
    typed: dict[int, DictConfig] = field(default_factory=dict)  # seed -> config, as Hydra composed it
    members: list[Member] = field(default_factory=list)
    due: bool = True

    def config(self, seed: int, compose: Compose) -> DictConfig:
        return self.typed.get(seed) or compose([*self.overrides, f"run.seed={seed}"])


@dataclass
class Rounds:
    """The rounds of the sweep that Hydra composed as `composed`.

    Nothing is kept from one command to the next: the same command goes through the same rounds, in which finished runs
    are not trained again, and finds the same verdicts.
    """

    composed: Sequence[DictConfig]
    settings: SweepSettings
    compose: Compose

    def __post_init__(self) -> None:
        """Raises UserError for a plan that cannot be kept, and an unknown baseline."""
        opened = [config.opened(composed) for composed in self.composed]
        self.output_dir = Path(opened[0][0].output_dir)
        self.plan = planned(opened[0][0], self.settings)
        typed = dict.fromkeys(int(cfg.run.seed) for cfg, _, _ in opened)
        more = itertools.count(max(typed) + 1)
        self.seeds = list(itertools.islice(itertools.chain(typed, more), self.plan.seeds))
        if len(typed) > self.plan.seeds:
            raise UserError(f"run.seed has {len(typed)} values; set sweep.max_seeds={len(typed)} or more")
        by_overrides: dict[tuple[str, ...], Contender] = {}
        for composed, (cfg, _, overrides) in zip(self.composed, opened, strict=True):
            without = tuple(one for one in overrides if not one.lstrip("+").startswith("run.seed="))
            choices = {key: word(value) for key, value in config.arm(cfg, overrides).items()}
            label = ", ".join(f"{key}={value}" for key, value in choices.items())
            contender = by_overrides.setdefault(without, Contender(without, ArmRuns(label, choices, {})))
            contender.typed[int(cfg.run.seed)] = composed
        self.contenders = list(by_overrides.values())
        if len(self.contenders) < 2:
            raise UserError(
                "a sweep of one arm decides nothing; vary more than run.seed, or leave sweep.seeds_until out"
            )
        find_baseline([contender.arm for contender in self.contenders], self.settings.baseline or "")

    def run(self, train: Callable[[Sequence[DictConfig]], Sequence[Member]]) -> None:
        """Go through the rounds. `train` trains arms and returns them in the same order."""
        for before, look in itertools.pairwise([0, *self.plan.looks]):
            self._train(self.seeds[before:look], train)
            if not any(member.status == "FINISHED" for one in self.contenders for member in one.members):
                return  # there is nothing to look at
            found = self._look()
            self._choose(found)
            print(f"look at {look} of {self.plan.seeds} seeds: {self._told(found)}", flush=True)
            if not any(one.due for one in self.contenders):
                break
        print(f"report: python -m nai_xl.compare sweep={self.settings.name} output_dir={self.output_dir}", flush=True)

    def _train(self, seeds: Sequence[int], train: Callable[[Sequence[DictConfig]], Sequence[Member]]) -> None:
        due = [(contender, seed) for seed in seeds for contender in self.contenders if contender.due]
        batch = [contender.config(seed, self.compose) for contender, seed in due]
        for (contender, _), member in zip(due, train(batch), strict=True):
            contender.members.append(member)

    def _look(self) -> Comparison:
        """Compare the runs of this sweep so far."""
        selection = select(Request({"sweep": str(self.settings.name), "output_dir": str(self.output_dir)}))
        names = {member.path.name for contender in self.contenders for member in contender.members}
        question = replace(
            selection.question,
            baseline=self.settings.baseline or "",
            metrics=tuple(self.settings.metrics),
            plan=self.plan,
        )
        runs = [run for run in selection.runs if run.name in names]
        return answered(replace(selection, runs=runs, question=question), recorded=True)

    def _choose(self, found: Comparison) -> None:
        """Which arms get further seeds: the baseline gets them as long as any other arm does."""
        for contender in self.contenders:
            verdicts = [row.verdict for row in found.rows if row.arm == contender.arm.label]
            decided = self.settings.seeds_until is not None and not any(one in OPEN for one in verdicts)
            pruned = self.settings.prune and "worse" in verdicts and "better" not in verdicts
            contender.due = contender.due and not decided and not pruned
        baseline = next(one for one in self.contenders if one.arm.label == found.baseline)
        baseline.due = any(one.due for one in self.contenders if one is not baseline)

    def _told(self, found: Comparison) -> str:
        """'minsnr better; p2 worse, gets no further seeds'."""
        parts = []
        for contender in self.contenders:
            rows = [row for row in found.rows if row.arm == contender.arm.label]
            if rows:
                verdicts = [f"{row.metric} {said(row)}" if len(found.metrics) > 1 else said(row) for row in rows]
                end = "" if contender.due else " (no further seeds)"
                parts.append(f"{found.names[contender.arm.label]} {', '.join(verdicts)}{end}")
        return "; ".join(parts)


def planned(cfg: DictConfig, settings: SweepSettings) -> Plan:
    """The plan that an arm's config has. Raises UserError for one that cannot be kept."""
    plan = plan_of(cfg.sweep) or Plan.of(1)
    if plan.seeds < LEAST_SEEDS:
        where = "sweep.max_seeds=10" if settings.seeds_until else "run.seed=0,1,2,3,4"
        raise UserError(
            f"{plan.seeds} seeds are too few to judge an arm, and so to decide on further ones; set {where}"
        )
    return plan
