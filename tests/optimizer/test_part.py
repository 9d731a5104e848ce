"""Parts of tensors: their steps together are those of the whole tensor."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nai_xl.optimizer import blockwise
from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.optimizer.part import Part, in_parts


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_are_the_chunks_that_torch_makes(rows: int, count: int) -> None:
    whole = torch.arange(rows)
    chunks = [*torch.chunk(whole, count), *[whole[:0]] * count][:count]
    for number in range(count):
        part = Part((rows, 3), number, count)
        assert torch.equal(whole[part.start : part.stop], chunks[number])
        assert part.first == part.start * 3


def stepped(make: type, tensor: Tensor, gradients: list[Tensor], part: Part | None) -> tuple[Tensor, Any]:
    p = nn.Parameter(tensor if part is None else tensor[part.start : part.stop].clone())
    optimizer = make([p], lr=1e-2)
    if part is not None:
        in_parts(optimizer, {p: part})
    for gradient in gradients:
        p.grad = gradient.clone() if part is None else gradient[part.start : part.stop].clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("make", [AdamWBf16, AdamW8bit])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_rounding_and_blocks_of_parts_are_those_of_the_whole(make: type, count: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 512).bfloat16()
    gradients = [torch.randn(24, 512).bfloat16() for _ in range(3)]
    whole, _ = stepped(make, weight.clone(), gradients, None)
    parts = [stepped(make, weight, gradients, Part((24, 512), number, count))[0] for number in range(count)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_cut_through_a_block_keeps_the_moments_unrounded_on_every_rank() -> None:
    x = torch.zeros(32, 129)  # 4128 elements
    assert not blockwise.fits(x)
    even, odd = Part((32, 144), 1, 2), Part((32, 144), 1, 4)  # 9 and 4.5 blocks
    assert blockwise.fits(torch.zeros(16, 144), even) and not blockwise.fits(torch.zeros(8, 144), odd)


def test_moments_in_8_bits_are_read_where_cuts_go_through_their_blocks_and_back() -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(32, 144), [torch.randn(32, 144) for _ in range(2)]
    _, whole = stepped(AdamW8bit, weight.clone(), gradients, None)
    saved = whole.state_dict()
    state = saved["state"][0]
    expected = blockwise.decode(state["exp_avg_codes"].flatten(), state["exp_avg_scales"], True).view(32, 144)
    moments = []
    for number in range(4):
        part = Part((32, 144), number, 4)
        p = nn.Parameter(weight[part.start : part.stop].clone())
        optimizer = AdamW8bit([p])
        in_parts(optimizer, {p: part})
        cut = {key: value[part.start : part.stop] for key, value in state.items() if key.endswith("codes")}
        first, last = part.blocks(blockwise.BLOCK)
        cut |= {key: value[first:last] for key, value in state.items() if key.endswith("scales")}
        optimizer.load_state_dict({**saved, "state": {0: {**cut, "step": state["step"]}}})
        moments.append(optimizer.state[p]["exp_avg"])
    assert torch.equal(torch.cat(moments), expected)
    again = AdamW8bit([q := nn.Parameter(weight.clone())])
    whole_moments = {"exp_avg": expected, "exp_avg_sq": torch.zeros(32, 144), "step": state["step"]}
    again.load_state_dict({**again.state_dict(), "state": {0: whole_moments}})
    read = again.state[q]
    found = blockwise.decode(read["exp_avg_codes"].flatten(), read["exp_avg_scales"], True).view(32, 144)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert again.state_dict()["state"][0].keys() == state.keys()
