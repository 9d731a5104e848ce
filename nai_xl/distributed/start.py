"""accelerate's process group, as every option of the group `distributed` begins it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import KwargsHandler

from nai_xl.errors import UserError
from nai_xl.interfaces import Precision


def accelerator(precision: Precision, *handlers: KwargsHandler) -> Accelerator:
    """Raises UserError for fp16 without a GPU, whose loss scaler a CPU lacks."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision=fp16 needs a GPU; use precision=bf16 or precision=fp32 on a CPU")
    return Accelerator(
        mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=list(handlers) or None
    )
