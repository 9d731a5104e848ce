"""distributed=none: one process on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nai_xl.distributed.launch import several
from nai_xl.distributed.start import accelerator
from nai_xl.distributed.strategy import DataParallel, Engine, Strategy
from nai_xl.errors import UserError
from nai_xl.interfaces import Precision


@dataclass(frozen=True)
class SingleProcess(Engine):
    """One process on one device."""

    several: ClassVar[bool] = False

    def start(self, precision: Precision) -> Strategy:
        """Raises UserError inside a multi-process launch, where every process would train a model of its own."""
        if several():
            raise UserError("started on several processes with distributed=none; set distributed=ddp")
        return DataParallel(accelerator(precision))
