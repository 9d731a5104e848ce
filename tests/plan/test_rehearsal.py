"""The rehearsal against a real run: what is alive in a training of the tiny model, counted while it happens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import nn

from nai_xl import config
from nai_xl.memory.activation_budget import ActivationBudget
from nai_xl.memory.bf16_weights import Bf16Weights
from nai_xl.memory.compile import Compile
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from nai_xl.model.flops import forward_flops
from nai_xl.model.sdxl.configs import unet_skeleton
from nai_xl.model.tiny import tiny_unet_skeleton
from nai_xl.plan.footprint import ALLOWANCE, Footprint, kept_share
from nai_xl.plan.live_bytes import LiveBytes
from nai_xl.plan.rehearsal import Micro, Rehearsal
from nai_xl.train import train as train_run
from nai_xl.training import session


def rehearse(cfg: DictConfig, micro: Micro) -> Footprint:
    """On a CPU, as it then really happens."""
    actions = [config.build(node) for node in cfg.memory.values()]
    rehearsal = Rehearsal(tiny_unet_skeleton(), actions, config.build(cfg.optimizer), config.build(cfg.ema), cuda=False)
    return rehearsal.run(micro)


def watched(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> LiveBytes:
    """Train, with every tensor that the loop makes counted."""
    live, loop = LiveBytes(block=1), session.train
    cfg.evals = {}  # sampling is not part of a step

    def train(settings: Any, parts: Any, **place: Any) -> int:
        live.add_weights(list(parts.state.trainable.parameters.values()))
        for tensor in parts.state.averages().values():
            live.add(tensor)
        parts.hooks = []  # a save copies the state to main memory, which on a CPU is the same
        with live:
            return loop(settings, parts, **place)

    monkeypatch.setattr(session, "train", train)
    train_run(cfg, {})
    return live


CHOICES = [
    [],
    ["memory=[sdpa,gradient_checkpointing]"],
    ["precision=bf16"],
    ["memory=[sdpa,bf16_weights,gradient_checkpointing,optimizer_in_backward]", "optimizer=adafactor"],
    ["run.grad_accum=2", "ema=none"],
]


@pytest.mark.parametrize("overrides", CHOICES, ids=lambda overrides: " ".join(overrides) or "plain")
def test_peak_is_that_of_a_real_run(
    overrides: list[str], small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small("bucketing=square", "run.batch_size=4", "run.max_images=16", *overrides)
    live = watched(cfg, monkeypatch)
    keeps = cfg.run.grad_accum > 1
    found = rehearse(cfg, Micro(4, 128, 128, precision=cfg.precision.autocast, keeps_gradients=keeps))
    assert found.peak == pytest.approx(live.peak, rel=0.02)


# --- the count --------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    live = LiveBytes(block=512)
    with live:
        a = torch.zeros(1000)  # 4000 bytes, 8 blocks
        view = a[10:].view(2, -1)
        assert live.live == 4096
        b = a + 1
        assert live.live == live.peak == 8192
        del a
        assert live.live == 8192, view.shape
        del view, b
        assert live.live == 0 and live.peak == 8192
        with live.elsewhere():
            torch.zeros(5)
    assert live.peak == 8192


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))
def test_a_linear_layer_keeps_its_input(batch: int, wide: int, out: int) -> None:
    layer, x = nn.Linear(wide, out), torch.zeros(batch, wide)
    live = LiveBytes(block=1)
    given = live.add_weights(list(layer.parameters())) + live.add(x)
    with live:
        y = layer(x).square().mean()
        assert live.live == given + 4 * batch * out + 4  # what square keeps, and the mean
        y.backward()
    assert live.flops == 2 * 2 * batch * wide * out  # forward, and the weight's gradient


def step(micro: Micro, *actions: Any, cuda: bool = True, optimizer: Any = torch.optim.SGD) -> Footprint:
    return Rehearsal(tiny_unet_skeleton(), actions, optimizer, None, cuda=cuda).run(micro)


# linear layers whose input is data: the copies of their weights are not needed again
NO_GRADIENT_TO_THE_INPUT = ("attn2.to_k", "attn2.to_v", "_embedding.linear_1")


def test_parts_by_closed_forms() -> None:
    n = sum(p.numel() for p in tiny_unet_skeleton().parameters())
    tensors = len(list(tiny_unet_skeleton().parameters()))
    plain = step(Micro(2, 64, 64), cuda=False, optimizer=torch.optim.AdamW)
    assert (plain.parameters, plain.weights, plain.gradients) == (n, 4 * n, 4 * n)
    assert plain.optimizer == 8 * n + 4 * tensors and plain.ema == plain.cast_copy == 0
    cast = step(Micro(2, 64, 64, precision="bf16"), cuda=False)
    assert cast.cast_copy == 2 * sum(
        m.weight.numel()
        for name, m in tiny_unet_skeleton().named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not name.endswith(NO_GRADIENT_TO_THE_INPUT)
    )
    half = step(Micro(2, 64, 64), Bf16Weights(), cuda=False)
    assert half.weights == half.gradients == 2 * n
    assert plain.needed > plain.peak + ALLOWANCE


def test_activations_grow_with_images_and_area_alone() -> None:
    """Every level of the UNet has whole tokens on these canvases, so bytes are affine in both."""
    one, two, three = (step(Micro(b, 64, 64), cuda=False).activations for b in (1, 2, 3))
    assert three - two == two - one > 0
    wide, large = (step(Micro(1, 64, w), cuda=False).activations for w in (128, 192))
    assert large - wide == wide - one > 0


def test_recomputation_costs_flops_and_spares_bytes() -> None:
    forward = forward_flops(tiny_unet_skeleton(), 128, 128)
    plain, recomputed = step(Micro(2, 128, 128)), step(Micro(2, 128, 128), GradientCheckpointing())
    assert plain.flops == pytest.approx(2 * 3 * forward, rel=0.1)
    assert plain.flops + 2 * 0.5 * forward < recomputed.flops < plain.flops + 2 * forward
    assert recomputed.activations < 0.25 * plain.activations


def test_cuda_autocast_keeps_norms_in_float32() -> None:
    wide, narrow = (step(Micro(1, 64, 64, precision="bf16"), cuda=cuda).activations for cuda in (True, False))
    assert wide > 1.1 * narrow


@given(st.floats(0, 1))
def test_a_budget_keeps_a_share_between_its_ends(budget: float) -> None:
    assert kept_share([ActivationBudget(budget)]) is None  # nothing is compiled, so nothing is chosen
    share = kept_share([ActivationBudget(budget), Compile()])
    assert share is not None and 0.09 <= share <= 1
    assert share == pytest.approx(0.58, abs=0.49 * abs(budget - 0.5) * 2.01)


def test_sdxl_as_counted_elsewhere() -> None:
    """One 1024 image: 25.84 TFLOP with everything recomputed by torch.utils.checkpoint, 0.55 GiB kept.

    Where a ResNet block changes its width, that computes the second convolution again, 0.34 TFLOP that nothing reads.
    """
    gib = float(1 << 30)
    found = Rehearsal(unet_skeleton(), [Bf16Weights(), GradientCheckpointing()], torch.optim.SGD, None).run(
        Micro(1, 1024, 1024)
    )
    assert found.activations / gib == pytest.approx(0.55, abs=0.01)
    assert found.flops / 1e12 == pytest.approx(25.84 - 0.34, rel=0.002)
    assert found.weights / gib == pytest.approx(4.78, abs=0.01)
