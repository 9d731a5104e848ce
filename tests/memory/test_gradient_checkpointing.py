"""Gradient checkpointing: what it saves and costs, as exact counts, and where it would be wrong."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from nai_xl.memory import gradient_checkpointing
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import Sdpa
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from tests.memory.counted import flops, saved_bytes, unet_with
from tests.memory.test_memory import loss_of, plain_unet


def test_more_checkpointing_saves_more_and_costs_more() -> None:
    ff, transformer, everything = map(GradientCheckpointing, ("ff", "transformer", "all"))
    choices: list[list[MemoryAction]] = [[], [ff], [transformer], [everything]]
    saved = [saved_bytes(Sdpa(), *chosen) for chosen in choices]
    cost = [flops(*chosen) for chosen in choices]
    assert saved == sorted(set(saved), reverse=True)
    assert cost == sorted(set(cost))
    assert saved[-1] < saved[0] / 4


def test_checkpointed_feed_forwards_cost_their_own_flops_once_more() -> None:
    """The first GEMM's, 2 x tokens x C x 8C: the last one's result is no input of the backward pass."""
    unet = plain_unet()
    tokens: Counter[int] = Counter()
    for module in unet.modules():
        if isinstance(module, FeedForward):
            module.register_forward_hook(lambda m, args, out: tokens.update({out.shape[-1]: out.shape[:-1].numel()}))
    loss_of(unet)
    again = sum(2 * count * width * 8 * width for width, count in tokens.items())
    assert flops(GradientCheckpointing("ff")) - flops() == again


def flagged(unet: nn.Module) -> dict[type, set[bool]]:
    """Block type -> whether it is checkpointed."""
    found: dict[type, set[bool]] = {}
    for module in unet.modules():
        if hasattr(module, "gradient_checkpointing"):
            found.setdefault(type(module), set()).add(module.gradient_checkpointing)
    return found


def test_blocks_are_those_named() -> None:
    assert {flag for flags in flagged(unet_with(GradientCheckpointing("all"))).values() for flag in flags} == {True}
    named = flagged(unet_with(GradientCheckpointing("transformer")))
    assert named.pop(Transformer2DModel) == {True}
    assert {flag for flags in named.values() for flag in flags} == {False}
    assert {flag for flags in flagged(unet_with(GradientCheckpointing("ff"))).values() for flag in flags} == {False}


@pytest.mark.parametrize("blocks", ["all", "transformer", "ff"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_alone_has_the_random_state_kept(blocks: Any, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the recomputation must drop what the forward pass dropped: gradients equal those without it."""

    def gradients(*actions: MemoryAction) -> list[Tensor]:
        unet = unet_with()
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        for action in actions:
            action.apply(unet)
        torch.manual_seed(3)
        read.clear()
        loss_of(unet).backward()
        return [parameter.grad for parameter in unet.parameters()]

    read: list[int] = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (read.append(1), state())[1])
    expected = gradients()
    for found, gradient in zip(gradients(GradientCheckpointing(blocks)), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert bool(read) == (dropout > 0)


def test_torch_recomputes_where_our_own_way_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch: list[object] = []
    torchs = gradient_checkpointing.checkpoint
    monkeypatch.setattr(
        gradient_checkpointing, "checkpoint", lambda *a, **k: (by_torch.append(a[0]), torchs(*a, **k))[1]
    )

    def blocks(unet: Any) -> set[object]:
        by_torch.clear()
        loss_of(unet).backward()
        return set(by_torch)

    unet = unet_with(Sdpa(), GradientCheckpointing())
    assert not blocks(unet)
    one = unet.mid_block.resnets[1]
    one._compiled_call_impl = one._call_impl  # as Module.compile leaves it
    assert blocks(unet) == {one}
    unet.conv_in.requires_grad_(False)
    unet.time_embedding.requires_grad_(False)
    unet.add_embedding.requires_grad_(False)
    assert unet.down_blocks[0].resnets[0] in blocks(unet)
    with monkeypatch.context() as several:
        several.setattr(torch.distributed, "is_initialized", lambda: True)
        assert len(blocks(unet)) > 10


def test_a_gate_reads_what_comes_before_it() -> None:
    plain, gated = (
        BasicTransformerBlock(8, 1, 8, norm_type=kind, num_embeds_ada_norm=4 if "ada" in kind else None)
        for kind in ("layer_norm", "ada_norm_zero")
    )
    assert gradient_checkpointing._ends(plain) == [plain.ff.net[-1]]
    assert gradient_checkpointing._ends(gated) == []


@pytest.mark.parametrize("blocks", ["all", "transformer", "ff"])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_blocks_compiled_in_place_are_checkpointed_as_compiled(blocks: Any, compiled_first: bool) -> None:
    """aot_eager traces the forward and the backward pass and then runs torch's own kernels."""
    unet = unet_with(Sdpa())
    block = unet.down_blocks[1].attentions[0].transformer_blocks[0]
    steps = [
        lambda: block.compile(backend="aot_eager", fullgraph=True),
        lambda: GradientCheckpointing(blocks).apply(unet),
    ]
    for step in steps if compiled_first else reversed(steps):
        step()
    other = unet_with(Sdpa())
    for model in (unet, other):
        loss_of(model).backward()
    for found, expected in zip(unet.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7)
