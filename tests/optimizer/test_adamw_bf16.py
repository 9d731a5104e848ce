"""AdamWBf16 against torch.optim.AdamW in float64, and where rounding to the nearest stands still."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16

SHAPES = ((7,), (33, 20), (8, 4, 3, 3))
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


def weights(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=random, dtype=torch.float64).bfloat16() for shape in SHAPES]
    found[-1] = found[-1].to(memory_format=torch.channels_last)
    return [nn.Parameter(x.to(dtype)) for x in found]


def gradients(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1000 + step)
    return [(torch.randn(shape, generator=random) + 0.5).bfloat16() for shape in SHAPES]


def stepped(optimizer: Any, steps: range) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def reference(steps: int, **changes: Any) -> list[Tensor]:
    return stepped(torch.optim.AdamW(weights(torch.float64), **{**SETTINGS, **changes}), range(steps))


def test_float32_weights_are_trained_as_torch_does() -> None:
    found = stepped(AdamWBf16(weights(torch.float32), **SETTINGS), range(30))
    for ours, exact in zip(found, reference(30), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


def test_bfloat16_weights_stay_within_their_noise_of_the_float64_trajectory_and_are_unbiased() -> None:
    """30 roundings of at most one spacing (2^-7 of the weight), independent: the mean over seeds comes nearer."""
    runs = [stepped(AdamWBf16(weights(torch.bfloat16), **SETTINGS, seed=seed), range(30)) for seed in range(16)]
    for place, exact in enumerate(reference(30)):
        errors = torch.stack([run[place].double() - exact for run in runs]) / exact.abs().clamp_min(0.25)
        assert errors.square().mean().sqrt() < 30**0.5 * 2.0**-7
        assert errors.mean(0).square().mean().sqrt() < 1.5 * errors.square().mean().sqrt() / 16**0.5


def test_small_updates_move_the_weights_where_rounding_to_the_nearest_never_does() -> None:
    """A step of 1e-4 on a weight of 1, whose neighbours in bfloat16 are 1/256 below and 1/128 above."""
    changes = {"lr": 1e-4, "weight_decay": 0.0}
    ours = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    nearest = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    pairs = [(ours, AdamWBf16([ours], **changes)), (nearest, torch.optim.AdamW([nearest], **changes))]
    for _ in range(100):
        for p, optimizer in pairs:
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert nearest.eq(1).all()
    # 100 steps of 1e-4; after some of them neighbours are 1/256 apart: standard error 0.01 sqrt(1/256/0.01) / 64
    assert ours.double().mean().item() == pytest.approx(0.99, abs=5e-4)


def test_the_second_moment_forgets_where_rounding_to_the_nearest_never_would() -> None:
    """Gradients fall to zero: v falls by 0.999 a step, less than half a spacing of bfloat16."""
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamWBf16([p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].double().mean()
    p.grad = torch.zeros_like(p)
    for _ in range(100):
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].double().mean() / first == pytest.approx(0.999**100, rel=3e-3)


@pytest.mark.parametrize("make", [AdamWBf16, AdamW8bit])
def test_another_seed_rounds_otherwise_and_the_global_generator_is_left_alone(make: Any) -> None:
    before = torch.get_rng_state()
    a, b, c = (stepped(make(weights(torch.bfloat16), seed=seed), range(3)) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert all(x.equal(y) for x, y in zip(a, b, strict=True))
    assert not all(x.equal(y) for x, y in zip(a, c, strict=True))
