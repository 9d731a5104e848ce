"""Warming up compiles every bucket before the first step and changes nothing of the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from omegaconf import DictConfig
from torch._dynamo.utils import counters

from nai_xl.diffusion.loss import min_snr
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.diffusion.timesteps import uniform
from nai_xl.distributed.strategy import DataParallel
from nai_xl.engine.precompile import precompile
from nai_xl.interfaces import Batch, Bucket, Losses
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.task.text_images import random_batch
from tests.conftest import joined
from tests.test_train import losses, run, same_weights

Compose = Callable[..., DictConfig]
OBJECTIVE = Objective(ztsnr(scaled_linear()), V(), uniform, min_snr)
BUCKETS = [Bucket(64, 96), Bucket(96, 160), Bucket(128, 128)]


def loss(unet: Any, batch: Batch) -> Losses:
    values, level = OBJECTIVE(unet, batch)
    return Losses(values, level.t)


def one_of_each(sample: Batch, size: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    return [random_batch(sample, bucket, size, draw) for bucket in BUCKETS]


def sample() -> Batch:
    """What a data set gives: one sample, its text in half precision as in a cache."""
    return Batch(
        latents=torch.zeros(1, 4, 16, 16),
        context=torch.zeros(1, 77, 160, dtype=torch.float16),
        pooled=torch.zeros(1, 96),
        time_ids=torch.tensor([[96.0, 160, 0, 0, 96, 160]]),
        weight=torch.ones(1),
        position=torch.zeros(1, dtype=torch.int64),
        item=torch.zeros(1, dtype=torch.int64),
        u=torch.zeros(1, dtype=torch.float64),
        noise=torch.zeros(1, 4, 16, 16),
    )


@pytest.mark.parametrize("size", [1, 3])
def test_a_random_batch_looks_like_one_of_the_data_set_and_holds_no_zeros(size: int) -> None:
    one = sample()
    found = random_batch(one, Bucket(160, 96), size, torch.Generator().manual_seed(0))
    expected = joined([one] * size)
    for name in Batch.__dataclass_fields__:
        here, there = getattr(found, name), getattr(expected, name)
        assert here.dtype == there.dtype and here.is_contiguous(), name
        if name not in ("latents", "noise"):
            assert here.shape == there.shape, name
    assert found.latents.shape == found.noise.shape == (size, 4, 12, 20)
    for name in ("latents", "noise", "context", "pooled"):
        assert getattr(found, name).float().std() == pytest.approx(1, abs=0.2), name


def test_every_shape_runs_forward_and_backward_through_every_block_once() -> None:
    unet = tiny_sdxl(seed=0).unet.eval()
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    shapes: list[tuple[int, ...]] = []
    backward = 0

    def count(*_: Any) -> None:
        nonlocal backward
        backward += 1

    unet.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    for block in blocks:
        block.register_full_backward_hook(count)
    sample_in_fp32 = sample()
    sample_in_fp32.context = sample_in_fp32.context.float()
    first = next(unet.parameters())
    strategy = DataParallel(Accelerator(cpu=True))
    seconds = precompile(loss, unet, first, strategy, one_of_each(sample_in_fp32, 2))
    assert shapes == [(2, 4, 12, 8), (2, 4, 20, 12), (2, 4, 16, 16)] and seconds > 0
    assert backward == len(shapes) * len(blocks)
    assert unet.training


def test_weights_gradients_hooks_and_random_state_are_left_alone() -> None:
    unet = tiny_sdxl(seed=0).unet
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    stepped: list[str] = []
    for name, parameter in unet.named_parameters():  # as an optimizer that steps inside the backward pass does
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: stepped.append(name))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    shapes = one_of_each(_in_float32(sample()), 1)
    precompile(loss, unet, next(unet.parameters()), DataParallel(Accelerator(cpu=True, mixed_precision="no")), shapes)
    assert torch.equal(torch.get_rng_state(), state)
    assert not stepped
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in unet.named_parameters())


def _in_float32(batch: Batch) -> Batch:
    batch.context = batch.context.float()
    return batch


def all_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_to_the_last_bit_with_and_without_it(
    small: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def counted(*args: Any) -> float:
        counters.clear()
        seconds = precompile(*args)
        made.append(counters["stats"]["unique_graphs"])
        counters.clear()
        return seconds

    monkeypatch.setattr("nai_xl.training.session.precompile", counted)
    overrides = ["memory=[compile]", "run.max_images=12", "~evals.sample_grid"]
    warmed = run(small(*overrides, "name=warm"))
    assert made == [14] and counters["stats"]["unique_graphs"] == 0  # not one graph is left for the steps themselves
    told = [row["perf/compile_seconds"] for row in all_rows(warmed) if "perf/compile_seconds" in row]
    assert len(told) == 1 and told[0] > 0
    assert "compiled for 3 bucket shapes in" in capsys.readouterr().out
    monkeypatch.setattr("nai_xl.training.session.precompile", lambda *_: 0.0)
    cold = run(small(*overrides, "name=cold"))
    assert losses(warmed) == losses(cold) and len(losses(cold)) == 6
    assert same_weights(warmed, cold)


def test_runs_that_compile_nothing_do_not_warm_up(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.training.session.precompile", None)
    folder = run(small("run.max_images=2", "~evals.sample_grid", "memory=[]"))
    assert not any("perf/compile_seconds" in row for row in all_rows(folder))
