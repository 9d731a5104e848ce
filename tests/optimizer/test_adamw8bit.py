"""Block-wise 8-bit numbers against a search through all of them; the optimizer against the full-precision one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.blockwise import BLOCK, code_values, decode, encode, fits

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_code_values_are_256_ascending_numbers_up_to_one_with_a_zero(signed: bool) -> None:
    values = code_values(signed, CPU)
    assert len(values) == 256 and values.diff().gt(0).all()
    assert 0 in values and values[-1] == 1
    assert values[0] > -1 if signed else values[0] == 0
    negative, positive = values[values < 0], values[values > 0]
    assert (-negative.flip(0)).equal(positive[:-1]) if signed else len(positive) == 255  # 1 has no negative


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), signed=st.booleans(), spread=st.floats(0, 20))
def test_every_code_is_the_nearest_of_all(seed: int, signed: bool, spread: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * BLOCK, generator=random) * torch.exp(-spread * torch.rand(2 * BLOCK, generator=random))
    x = x if signed else x.square()
    codes, scales = encode(x, signed)
    assert scales.equal(x.view(2, BLOCK).abs().amax(1))
    shares = (x.view(2, BLOCK) / scales[:, None]).double().view(-1)
    distances = (shares[:, None] - code_values(signed, CPU).double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen - distances.amin(1)).max() < 1e-7  # ties and float32's last bit aside
    torch.testing.assert_close(
        decode(codes, scales, signed), (code_values(signed, CPU)[codes.int()] * scales.repeat_interleave(BLOCK))
    )


def test_zeros_stay_zeros() -> None:
    for signed in (True, False):
        assert not decode(*encode(torch.zeros(BLOCK), signed), signed).any()


def test_small_and_odd_tensors_keep_full_moments() -> None:
    assert [fits(torch.zeros(n)) for n in (4096, 4352, 4095, 3840, 5000)] == [True, True, False, False, False]
    small = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = AdamW8bit([small])
    small.grad = torch.ones_like(small)
    optimizer.step()
    assert optimizer.state[small]["exp_avg_sq"].dtype == torch.bfloat16


def test_the_trajectory_stays_near_the_full_precision_one() -> None:
    """The first step's error is that of the codes, at most 1/2 of a spacing; over 50 steps it does not grow."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float64, torch.float32)]
    optimizers = [torch.optim.AdamW(params[:1], lr=1e-2), AdamW8bit(params[1:], lr=1e-2)]
    for step in range(50):
        g = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)) + 0.3
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = g.to(p.dtype)
            optimizer.step()
    moved = params[0].detach() - start
    error = params[1].detach().double() - params[0].detach()
    assert error.square().mean().sqrt() < 0.1 * moved.square().mean().sqrt()
