"""State bytes as counted, against what is in the state of real optimizers and against the documented table."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nai_xl import config
from tests.optimizer.test_optimizer_options import OPTIONS

SHAPES = [(64, 80), (64, 80), (32, 16, 3, 3), (11,), (4100,)]
DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"


def maker(option: str) -> Callable[..., Any]:
    cfg = config.compose([f"optimizer={option}"])
    return lambda params: config.build(cfg.optimizer, params=params)


def state_bytes(option: str, shapes: Iterable[Iterable[int]], dtype: torch.dtype) -> int:
    """Bytes of state that an optimizer keeps for parameters of these shapes after a step.

    One parameter of each distinct shape is stepped: on the meta device, where torch's fused AdamW has no kernel.
    """
    counts = Counter(tuple(shape) for shape in shapes)
    make, total = maker(option), 0
    for shape, count in counts.items():
        p = nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu" if option == "adamw" else "meta"))
        p.grad = torch.zeros_like(p)
        optimizer = make(params=[p])
        optimizer.step()
        total += count * sum(stored_bytes(value) for value in optimizer.state[p].values())
    return total


def stored_bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_a_real_step_leaves(option: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = maker(option)(params=params)
    optimizer.step()
    real = sum(stored_bytes(value) for state in optimizer.state.values() for value in state.values())
    assert state_bytes(option, SHAPES, dtype) == real


def test_closed_forms() -> None:
    """One matrix of 256 x 512: both moments and the step; codes and scales; a row and a column."""
    n, step = 256 * 512, 4
    assert state_bytes("adamw", [(256, 512)], torch.float32) == 8 * n + step
    assert state_bytes("adamw_bf16", [(256, 512)], torch.bfloat16) == 4 * n + step
    assert state_bytes("adamw8bit", [(256, 512)], torch.bfloat16) == 2 * n + 2 * 4 * n // 256 + step
    assert state_bytes("adafactor", [(256, 512)], torch.bfloat16) == 4 * (256 + 512) + step


@pytest.mark.parametrize("option", OPTIONS)
def test_the_documented_bytes_are_those_of_the_full_unet(option: str, sdxl_shapes: list[tuple[int, ...]]) -> None:
    """Weights, gradients and state of SDXL's UNet, per parameter."""
    row = re.search(rf"^\| {option} \|[^|]*\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", DOCS.read_text(), re.MULTILINE)
    assert row is not None
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[row[1]]
    count = sum(torch.Size(shape).numel() for shape in sdxl_shapes)
    total = state_bytes(option, sdxl_shapes, dtype) + 2 * dtype.itemsize * count
    assert float(row[2]) == round(total / count, 2)
    assert float(row[3]) == round(total / 2**30, 1)


@pytest.fixture(scope="module")
def sdxl_shapes() -> list[tuple[int, ...]]:
    import json

    from diffusers import UNet2DConditionModel

    root = Path(config.__file__).parents[1] / "assets" / "sdxl" / "unet" / "config.json"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(root.read_text()))
    return [tuple(p.shape) for p in unet.parameters()]
