"""Every option of the optimizer group: trains the tiny UNet, resumes exactly, keeps groups and never waits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nai_xl import config
from nai_xl.engine.checkpoint import LocalCheckpoints, ModuleState
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.optimizer.lr import LearningRate, constant
from nai_xl.optimizer.rounding import rounds_stochastically
from nai_xl.optimizer.stochastic import keep_layout
from tests.conftest import Alone

OPTIONS = sorted(path.stem for path in (config.conf_dir() / "optimizer").glob("*.yaml"))
BF16 = ["adamw_bf16", "adamw8bit", "adafactor"]
CASES = [(option, torch.float32) for option in OPTIONS] + [(option, torch.bfloat16) for option in BF16]
every_case = pytest.mark.parametrize(("option", "dtype"), CASES)


def built(option: str, params: Any, *overrides: str) -> Any:
    cfg = config.compose([f"optimizer={option}", *overrides])
    config.check(cfg, only=["optimizer"])
    optimizer = config.build(cfg.optimizer, params=params)
    keep_layout(optimizer)
    return optimizer


class Small(nn.Module):
    """One of each: an 8-bit sized matrix, a kernel in NHWC order, a bias, and a learned weighting in float32."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(64, 80, generator=random).to(dtype))
        kernel = torch.randn(32, 16, 3, 3, generator=random).to(dtype)
        self.kernel = nn.Parameter(kernel.to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.randn(11, generator=random).to(dtype))
        self.learned = nn.Parameter(torch.zeros(3))

    def groups(self) -> list[dict[str, Any]]:
        own = {"params": [self.learned], "lr": 0.05, "weight_decay": 0.0}
        return [{"params": [self.matrix, self.kernel, self.bias]}, own]

    def step(self, optimizer: Any, number: int) -> None:
        random = torch.Generator().manual_seed(number)
        for p in self.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=random))
        optimizer.step()


def test_which_options_may_train_bfloat16_weights() -> None:
    found = [option for option in OPTIONS if rounds_stochastically(built(option, Small(torch.float32).groups()))]
    assert found == sorted(BF16)


@pytest.mark.parametrize(("option", "dtype"), [(o, torch.bfloat16 if o in BF16 else torch.float32) for o in OPTIONS])
def test_the_loss_of_one_batch_falls(option: str, dtype: torch.dtype) -> None:
    unet = tiny_sdxl(seed=0).unet.to(dtype)
    random = torch.Generator().manual_seed(0)
    widths = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 6 * 32
    x, target = torch.randn(2, 1, 4, 8, 8, generator=random).to(dtype)
    context = torch.randn(1, 7, widths[0], generator=random).to(dtype)
    added = {"text_embeds": torch.randn(1, widths[1], generator=random).to(dtype), "time_ids": torch.ones(1, 6)}
    optimizer = built(option, [{"params": list(unet.parameters())}])
    losses = []
    for _ in range(12):
        prediction = unet(x, torch.tensor([500]), context, added_cond_kwargs=added).sample
        loss = (prediction.float() - target.float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@every_case
def test_the_step_after_resuming_is_the_uninterrupted_one(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = Small(dtype)
    optimizer = built(option, whole.groups())
    for number in range(3):
        whole.step(optimizer, number)
    saved = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    saved.bind(model=ModuleState(whole), optimizer=optimizer)
    saved.save(3)
    saved.finish()
    resumed = Small(dtype, seed=1)
    fresh = built(option, resumed.groups())
    loaded = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    loaded.bind(model=ModuleState(resumed), optimizer=fresh)
    assert loaded.load_latest() == 3
    for number in range(3, 6):
        whole.step(optimizer, number)
        resumed.step(fresh, number)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert a.equal(b) and a.stride() == b.stride()


@every_case
def test_each_group_follows_its_own_rate_and_decay(option: str, dtype: torch.dtype) -> None:
    model = Small(dtype)
    optimizer = built(option, model.groups())
    rates = LearningRate(optimizer, constant, 10)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.step(optimizer, 0)
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    assert rates.set(1) == pytest.approx(1e-3)
    model.step(optimizer, 1)
    assert model.learned.abs().mean() > 5e-3  # its own 0.05, not the network's 0.001
    assert optimizer.param_groups[1]["weight_decay"] == 0
    assert not model.matrix.equal(before[0])


class Waits(TorchDispatchMode):
    """Counts the operations that bring a number from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@every_case
def test_a_step_never_waits_for_the_device(option: str, dtype: torch.dtype) -> None:
    model = Small(dtype)
    optimizer = built(option, model.groups())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    model.step(optimizer, 0)
    with Waits() as waits:
        model.step(optimizer, 1)
    assert waits.count == 0


def states(optimizer: Any) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("option", OPTIONS)
def test_a_refused_step_changes_nothing_at_all(option: str) -> None:
    model = Small(torch.float32)
    optimizer = built(option, model.groups())
    assert optimizer._step_supports_amp_scaling
    model.step(optimizer, 0)
    before = [x.detach().clone() for x in (*model.parameters(), *states(optimizer))]
    optimizer.found_inf = torch.tensor(1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(before, (*model.parameters(), *states(optimizer)), strict=True))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("refused_first", [False, True])
def test_gradients_are_divided_by_the_scale(option: str, refused_first: bool) -> None:
    """Also where the very first step is refused: nothing, not even the step's number, may remember it."""
    models = Small(torch.float32), Small(torch.float32)
    plain, scaled = (built(option, model.groups()) for model in models)
    if refused_first:
        scaled.found_inf = torch.tensor(1.0)
        models[1].step(scaled, 7)
    scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for number in range(3):
        models[0].step(plain, number)
        random = torch.Generator().manual_seed(number)
        for p in models[1].parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=random) * 8)
        scaled.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
