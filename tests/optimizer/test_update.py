"""The two ways to update weights, against torch's own clip and step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from nai_xl.distributed.none import SingleProcess
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.checkpoint import LocalCheckpoints, ModuleState, split_tensors
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.optimizer.adafactor import Adafactor
from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.optimizer.update import UpdateInBackward, WholeUpdate, blocks_of, poisoned
from tests.conftest import Alone

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture
def strategy() -> Strategy:
    return SingleProcess().start("no")


def network() -> nn.Module:
    """Three blocks and something outside of them, named as a UNet's are."""
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())  # noqa: E731
    model = nn.ModuleDict({"resnets": nn.ModuleList([block(), block(), block()]), "out": nn.Linear(6, 2)})
    model.forward = lambda x: model["out"](nn.Sequential(*model["resnets"])(x))  # type: ignore[method-assign]
    return model


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return scale * (model(x) - 1).square().mean()


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain(make: Callable[..., Any], limit: float, scales: list[float]) -> tuple[list[Tensor], list[float]]:
    """torch's own clip and step."""
    model, norms = network(), []
    optimizer = make([{"params": list(model.parameters())}])
    for step, scale in enumerate(scales):
        loss_of(model, step, scale).backward()
        norms.append(clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), norms


def whole(
    strategy: Strategy, make: Callable[..., Any], limit: float, scales: list[float]
) -> tuple[list[Tensor], list[float]]:
    model, norms = network(), []
    optimizer = make([{"params": list(model.parameters())}])
    update = WholeUpdate(strategy, optimizer, optimizer, model.parameters(), limit)
    for step, scale in enumerate(scales):
        loss_of(model, step, scale).backward()
        norms.append(update().item())
        assert all(p.grad is None for p in model.parameters())
    return weights(model), norms


@every_optimizer
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_whole_update_is_clip_and_step(strategy: Strategy, make: Callable[..., Any], limit: float) -> None:
    found, norms = whole(strategy, make, limit, [1.0] * 8)
    expected, its_norms = plain(make, limit, [1.0] * 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert norms == pytest.approx(its_norms, rel=1e-5)


@every_optimizer
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_changes_nothing(
    strategy: Strategy, make: Callable[..., Any], scale: float
) -> None:
    found, norms = whole(strategy, make, 1.0, [1.0, 1.0, scale])
    expected, _ = plain(make, 1.0, [1.0, 1.0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.tensor(norms[-1]).isfinite()


OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_bf16": lambda params: AdamWBf16(params, lr=1e-2),
    "adamw8bit": lambda params: AdamW8bit(params, lr=1e-2),
    "adafactor": lambda params: Adafactor(params, lr=1e-2),
}
BAD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the loss, with finite gradients": lambda loss, free: poisoned(loss + free.sum() + math.inf),
    "all gradients": lambda loss, free: poisoned(loss * math.nan + free.sum()),
    "the gradient of a free parameter": lambda loss, free: poisoned(loss + (0 * free).sqrt().sum()),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("in_backward", [False, True], ids=["whole", "in backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), *OURS.values()], ids=[*OPTIMIZERS, *OURS])
def test_what_is_not_finite_moves_neither_weights_nor_state(
    strategy: Strategy,
    make: Callable[..., Any],
    dtype: torch.dtype,
    in_backward: bool,
    bad: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model, free = network().to(dtype), nn.Parameter(torch.ones(3))
    model["free"] = nn.Linear(64, 64, dtype=dtype)  # large enough for moments in blocks of 8 bits
    group = {"params": [free], "lr": 0.1}
    if in_backward:
        stepped = update = UpdateInBackward(make, named(model), 1.0, free=[group])
    else:
        stepped = make([{"params": list(model.parameters())}, group])
        update = WholeUpdate(strategy, stepped, stepped, model.parameters(), 1.0)

    def step(number: int, spoil: Callable[[Tensor, Tensor], Tensor]) -> bool:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
        loss = (model(x) - 1).float().square().mean() + model["free"].weight.float().square().mean()
        spoil(loss, free).backward()
        return bool(update().isfinite())

    def everything() -> list[Tensor]:
        found: dict[str, Tensor] = {}
        split_tensors(stepped.state_dict(), "", found)
        return [x.clone() for x in (*model.parameters(), free.detach(), *found.values())]

    assert step(0, lambda loss, free: loss + free.square().sum())
    before = everything()
    assert not step(1, bad)
    if in_backward and bad is BAD["the gradient of a free parameter"]:
        assert all(x.isfinite().all() for x in everything())  # blocks before it have moved by gradients of their own
    else:
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert step(2, lambda loss, free: loss + free.square().sum())
    assert any(not torch.equal(x, y) for x, y in zip(everything(), before, strict=True))


def test_parameters_outside_the_clip_are_not_scaled_by_it(strategy: Strategy) -> None:
    def gradients_taken(limit: float) -> Tensor:
        model, free = network(), nn.Parameter(torch.ones(3))
        groups = [{"params": list(model.parameters())}, {"params": [free]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
        update = WholeUpdate(strategy, optimizer, optimizer, model.parameters(), limit)
        (loss_of(model, 0) + free.sum()).backward()
        update()
        return free.detach()

    torch.testing.assert_close(gradients_taken(1e-3), torch.full((3,), 0.9))
    torch.testing.assert_close(gradients_taken(1e3), torch.full((3,), 0.9))


@every_optimizer
def test_update_in_backward_within_the_limit_is_the_usual_update(make: Callable[..., Any]) -> None:
    model, norms = network(), []
    update = UpdateInBackward(make, named(model), max_grad_norm=1e3)
    for step in range(8):
        loss_of(model, step).backward()
        norms.append(update().item())
    expected, its_norms = plain(make, 1e3, [1.0] * 8)
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)
    assert norms == pytest.approx(its_norms, rel=1e-5)


def test_update_in_backward_clips_every_block_by_its_own_norm() -> None:
    model = network()
    before = weights(model)
    update = UpdateInBackward(lambda params: torch.optim.SGD(params, lr=1.0), named(model), max_grad_norm=0.01)
    loss_of(model, 0, scale=100.0).backward()
    update()
    moved = iter([w - b for w, b in zip(weights(model), before, strict=True)])
    for block in blocks_of(named(model)):
        length = torch.cat([next(moved).flatten() for _ in block]).norm()
        torch.testing.assert_close(length, torch.tensor(0.01))


@every_optimizer
def test_update_in_backward_leaves_out_what_is_not_finite(make: Callable[..., Any]) -> None:
    model = network()
    update = UpdateInBackward(make, named(model), max_grad_norm=1.0)
    loss_of(model, 0).backward()
    update()
    before = weights(model)
    loss_of(model, 1, float("nan")).backward()
    assert update().isnan()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    loss_of(model, 2).backward()
    assert update().isfinite()


def test_gradients_never_lie_in_memory_all_at_once() -> None:
    model = network()
    seen: list[int] = []
    count = lambda: sum(p.grad is not None for p in model.parameters())  # noqa: E731
    update = UpdateInBackward(lambda params: torch.optim.SGD(params, lr=0.1), named(model), max_grad_norm=1.0)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: seen.append(count()))
    loss_of(model, 0).backward()
    assert max(seen) <= 2 and count() == 0 and len(seen) == 8
    update()


def test_weights_outside_the_network_are_updated_and_not_clipped() -> None:
    model, free = network(), nn.Parameter(torch.ones(3))
    update = UpdateInBackward(
        lambda params: torch.optim.SGD(params, lr=0.1),
        named(model),
        1e-3,
        free=[{"params": [free], "lr": 0.5}],
    )
    (loss_of(model, 0) + free.sum()).backward()
    norm = update()
    torch.testing.assert_close(free.detach(), torch.full((3,), 0.5))
    reference = network()
    loss_of(reference, 0).backward()
    torch.testing.assert_close(norm, clip_grad_norm_(reference.parameters(), 1.0))


def test_a_block_of_which_a_part_took_no_part_is_updated_too() -> None:
    model = network()
    model["resnets"][0].append(nn.Linear(1, 1))  # never used
    model.forward = lambda x: model["out"](model["resnets"][0][0](x))  # type: ignore[method-assign]
    before = weights(model)
    update = UpdateInBackward(lambda params: torch.optim.SGD(params, lr=0.1), named(model), max_grad_norm=1.0)
    loss_of(model, 0).backward()
    update()
    changed = [not torch.equal(w, b) for w, b in zip(weights(model), before, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert {name for name, c in zip(names, changed, strict=True) if c} == {
        "resnets.0.0.weight", "resnets.0.0.bias", "out.weight", "out.bias",
    }  # fmt: skip


def test_optimizers_in_backward_resume_exactly(tmp_path: Any) -> None:
    make = OPTIMIZERS["fused"]

    def begin() -> tuple[nn.Module, UpdateInBackward, LocalCheckpoints]:
        model = network()
        update = UpdateInBackward(make, named(model), max_grad_norm=1.0)
        checkpoints = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
        checkpoints.bind(model=ModuleState(model), optimizer=update)
        return model, update, checkpoints

    def go_on(model: nn.Module, update: UpdateInBackward, steps: range) -> None:
        for step in steps:
            loss_of(model, step).backward()
            update()

    model, update, checkpoints = begin()
    go_on(model, update, range(3))
    checkpoints.save(3)
    checkpoints.finish()
    go_on(model, update, range(3, 6))
    resumed, its_update, its_checkpoints = begin()
    assert its_checkpoints.load_latest() == 3
    go_on(resumed, its_update, range(3, 6))
    torch.testing.assert_close(weights(resumed), weights(model), rtol=0, atol=0)


def test_two_blocks_round_by_different_random_bits() -> None:
    model = network().bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    update = UpdateInBackward(
        lambda params: AdamWBf16(params, lr=1e-3, weight_decay=0.0), named(model), max_grad_norm=1e3
    )
    sum(p.sum() for p in model.parameters()).backward()
    update()
    first, second = (model["resnets"][n][0].weight for n in (0, 1))  # the first parameters of two blocks
    assert len(first.unique()) == 2 == len(second.unique())
    assert not torch.equal(first, second)


def test_blocks_are_those_of_the_unet_and_hold_every_parameter_once() -> None:
    unet = tiny_sdxl(seed=0).unet
    blocks = blocks_of(named(unet))
    assert sorted(map(id, unet.parameters())) == sorted(id(p) for block in blocks for p in block)
    kinds = [type(m).__name__ for m in unet.modules()]
    inner = kinds.count("BasicTransformerBlock") + kinds.count("ResnetBlock2D")
    assert len(blocks) > inner >= 10
    assert max(sum(p.numel() for p in b) for b in blocks) < 0.25 * sum(p.numel() for p in unet.parameters())
