"""torch.compile: fused kernels in place of single operations."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from nai_xl.errors import UserError
from nai_xl.files import user_cache
from nai_xl.memory import process_wide
from nai_xl.memory.action import MemoryAction

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
BACKEND: Any = "inductor"
# Graphs of one function before torch gives up and runs it uncompiled, by default 8. SDXL has 15 kinds of blocks, each
# in a version for the first shape and one for all others, or one for every bucket.
GRAPHS = 4096
WITHOUT = "or set '~memory.compile'"


@dataclass(frozen=True)
class Compile(MemoryAction):
    """Fused kernels in place of single operations; Ansel et al., PyTorch 2, ASPLOS 2024, doi 10.1145/3620665.3640366.

    `regional` compiles each transformer and ResNet block for itself, in place, so that parameters keep their names.
    Blocks of one kind share their graphs: compiling takes as long as for one of each, and works together with gradient
    checkpointing, autocast and DistributedDataParallel, which see the blocks from outside. False compiles the UNet as
    one graph. `dynamic` null makes one graph for the first shape and one for all others; true begins with the latter;
    false makes a graph for every bucket. What was compiled is kept in the cache directory for the next run.

    Raises UserError when it is built on a machine without what torch compiles with.
    """

    regional: bool = True
    dynamic: bool | None = None
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"

    # Fused operations round and sum in another order; of the loss in float32. In bfloat16 it is rather a gain: what is
    # fused stays in float32 in between.
    tolerance = 1e-4
    compiles = True

    def __post_init__(self) -> None:
        if BACKEND == "inductor":
            _refuse_without_compiler()

    def apply(self, model: Any) -> None:
        # torch keeps graphs and finished kernels in the temporary directory, which may not live to see the next run
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))
        self._configure()
        regions = [m for m in model.modules() if isinstance(m, BLOCKS)] if self.regional else [model]
        for region in regions:
            region.compile(backend=BACKEND, dynamic=self.dynamic, mode=self.mode)

    def _configure(self) -> None:
        dynamo = importlib.import_module("torch._dynamo")  # takes a second or two: only for those who compile
        dynamo.reset()  # an earlier run's graphs would serve this one too, and were made with that run's settings
        process_wide.change(dynamo.config, "recompile_limit", GRAPHS)
        process_wide.change(dynamo.config, "accumulated_recompile_limit", 8 * GRAPHS)
        process_wide.change(dynamo.config, "fail_on_recompile_limit_hit", True)  # in place of uncompiled from then on
        if self.regional:
            # cutting graphs at the edges of gradient buckets is for whole networks: a block ends soon enough by itself,
            # and would lose fusions and the plan of what it saves
            process_wide.change(dynamo.config, "optimize_ddp", False)


def uncompiled(actions: Sequence[MemoryAction]) -> AbstractContextManager[Any]:
    """Runs compiled blocks as they were before: samples come in other shapes, each of which would be compiled first."""
    if not any(action.compiles for action in actions):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _refuse_without_compiler() -> None:
    """UserError where torch's inductor could not compile: it writes Triton for GPUs and C++ for the CPU."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "memory.compile needs triton and a GPU of compute capability 7.0 or newer; "
                f"pip install triton, {WITHOUT}"
            )
        if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cl")))):
            raise UserError(f"memory.compile needs a C compiler to start Triton's kernels; install gcc, {WITHOUT}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"memory.compile needs a C++ compiler on the CPU; install g++ or name yours in the variable CXX, {WITHOUT}"
        ) from error
