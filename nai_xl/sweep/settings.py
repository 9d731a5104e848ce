"""The settings of a sweep: the node `sweep` of conf/train.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from omegaconf import DictConfig
from pydantic import AfterValidator, Field

from nai_xl import config
from nai_xl.compare.judging.verdicts import parse_margin
from nai_xl.errors import UserError

Count = Annotated[int, Field(ge=1)]
Look = Annotated[int, Field(ge=3)]  # compare.statistics.spending.LEAST_SEEDS


def _margin(text: str) -> str:
    parse_margin(text)
    return text


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep asks and how it runs; nothing here changes what an arm learns.

    name: null is the experiment's name, or else the swept keys. baseline: the arm that others are compared with, such
    as "schedule=ztsnr,loss=uniform". metrics: what they are compared by. equivalence: the largest difference that
    nobody minds, "2%" of the baseline or "0.1" in the metrics' units; null is what each metric declares. arms: for a
    sweep that is no full grid, the keys and values of each arm; what else is swept multiplies them. varied: the swept
    keys, place: of an arm among those that were typed; both are filled in. parallel: how many arms this machine trains
    at a time. processes: of each arm, one on each GPU; null is the arm's share of the GPUs, or 1 where
    distributed=none.

    seeds: how many each arm is to have, filled in by Hydra. looks: after how many of them the arms are compared, beside
    all of them. seeds_until: "decided" adds seeds to the arms that are undecided, max_seeds at most, with looks
    after 3, 6 and all of them where none are named. prune: an arm that a look finds worse gets no further seeds.
    """

    changes_weights: ClassVar[bool] = False

    name: str | None = None
    question: str | None = None
    baseline: str | None = None
    metrics: Sequence[str] = ()
    equivalence: Annotated[str, AfterValidator(_margin)] | None = None
    arms: Sequence[Mapping[str, Any]] = ()
    varied: Sequence[str] = ()
    place: int | None = None
    parallel: Count = 1
    processes: Count | None = None
    seeds: Count | None = None
    looks: Sequence[Look] = ()
    seeds_until: Literal["decided"] | None = None
    max_seeds: Count = 10
    prune: bool = False

    @property
    def in_rounds(self) -> bool:
        """Whether looks decide which arms get further seeds."""
        return self.prune or self.seeds_until is not None

    def processes_of(self, cfg: DictConfig, gpus: int) -> int:
        """How many processes train an arm of this config. Raises UserError for more than it or the machine can have."""
        several = config.build(cfg.distributed, plugins=tuple(cfg.plugins)).several
        if self.processes is None:
            return max(1, gpus // self.parallel) if several else 1
        if self.processes > 1 and not several:
            raise UserError(f"sweep.processes={self.processes} with distributed=none; set distributed=ddp")
        if 0 < gpus < self.processes:
            raise UserError(f"sweep.processes={self.processes} is more than this machine's {gpus} GPUs")
        return self.processes
