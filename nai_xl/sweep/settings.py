"""The settings of a sweep: the node `sweep` of conf/train.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from omegaconf import DictConfig
from pydantic import Field

from nai_xl import config
from nai_xl.errors import UserError

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep asks and how it runs; nothing here changes what an arm learns.

    name: null is the experiment's name, or else the swept keys. baseline: the arm that others are compared with, such
    as "schedule=ztsnr,loss=uniform". metrics: what they are compared by. arms: for a sweep that is no full grid, the
    keys and values of each arm; what else is swept multiplies them. varied: the swept keys, filled in by Hydra. place:
    of an arm, its place among those that were typed, filled in by the sweep.
    parallel: how many arms this machine trains at a time. processes: of each arm, one on each GPU; null is the arm's
    share of the GPUs, or 1 where distributed=none.
    """

    changes_weights: ClassVar[bool] = False

    name: str | None = None
    question: str | None = None
    baseline: str | None = None
    metrics: Sequence[str] = ()
    arms: Sequence[Mapping[str, Any]] = ()
    varied: Sequence[str] = ()
    place: int | None = None
    parallel: Count = 1
    processes: Count | None = None

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
