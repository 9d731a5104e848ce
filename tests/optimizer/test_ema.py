"""The moving average against its closed form, and swapping it in and out."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from nai_xl import config
from nai_xl.engine.checkpoint import LocalCheckpoints
from nai_xl.errors import UserError
from nai_xl.optimizer.ema import NoEma, StandardEma
from tests.conftest import Alone


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def move(m: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def weights(m: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in m.parameters()]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_average_is_the_warmed_up_sum_of_all_weights(decay: float, device: Literal["cpu"] | None) -> None:
    """As an explicit weighted sum in float64: weight k counts (1 - d_k) times the product of all later d."""
    m = model()
    ema = StandardEma(named(m), decay=decay, device=device)
    history = [[w.double() for w in weights(m)]]
    keep = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
    for step in range(1, 31):
        move(m, step)
        ema.update(step)
        history.append([w.double() for w in weights(m)])
    later = [torch.tensor(keep[k:], dtype=torch.float64).prod().item() for k in range(31)]
    share = [later[0], *((1 - keep[k - 1]) * later[k] for k in range(1, 31))]
    assert sum(share) == pytest.approx(1)
    for i, average in enumerate(ema.averages().values()):
        expected = sum(s * past[i] for s, past in zip(share, history, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [2, 5])
def test_rare_updates_forget_as_much_as_frequent_ones(every: int) -> None:
    """While the weights stand still between two updates, taking them in N times or once is the same."""
    m = model()
    rare, frequent = (
        StandardEma(named(m), decay=0.99, every=every),
        StandardEma(named(m), decay=0.99),
    )
    for step in range(1, 30 * every + 1):
        if step % every == 1:
            move(m, step)
        rare.update(step)
        frequent.update(step)
    torch.testing.assert_close(rare.averages(), frequent.averages(), rtol=1e-5, atol=1e-5)


def test_between_two_updates_nothing_is_taken_in() -> None:
    m = model()
    ema = StandardEma(named(m), every=3)
    before = {name: w.clone() for name, w in ema.averages().items()}
    for step in (31, 32):
        move(m, step)
        ema.update(step)
    assert all(torch.equal(w, before[name]) for name, w in ema.averages().items())


def test_short_runs_are_averaged_too() -> None:
    m = model()
    ema, reference = StandardEma(named(m), every=10), StandardEma(named(m))
    for step in range(1, 9):
        move(m, step)
        ema.update(step)
        reference.update(step)
    assert all(torch.equal(w, reference.averages()[name]) for name, w in ema.averages().items())


def test_an_average_in_main_memory_takes_in_the_weights_of_the_moment_it_is_given_them() -> None:
    m = model()
    ema, reference = (
        StandardEma(named(m), decay=0.5, device="cpu"),
        StandardEma(named(m), decay=0.5),
    )
    for step in range(1, 20):
        move(m, step)
        reference.update(step)
        ema.update(step)
        move(m, -step)  # while the average may still be at work
    assert all(torch.equal(w, reference.averages()[name]) for name, w in ema.averages().items())


def test_average_is_single_precision_whatever_the_model_is() -> None:
    m = model().bfloat16()
    ema = StandardEma(named(m), decay=0.999)
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0)
    before = {name: w.clone() for name, w in ema.averages().items()}
    ema.update(10**6)  # past the warm-up: a change of a thousandth is lost in bfloat16
    for name, average in ema.averages().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, before[name] + 0.001 * (1 - before[name]), rtol=1e-5, atol=1e-7)


def test_averages_inside_the_block_and_own_weights_bit_for_bit_after_it() -> None:
    m = model()
    ema = StandardEma(named(m))
    move(m, 1)
    ema.update(1)
    own = weights(m)
    with ema.swapped_in():
        assert all(map(torch.equal, m.parameters(), ema.averages().values()))
        assert not all(map(torch.equal, m.parameters(), own))
    assert all(map(torch.equal, m.parameters(), own))


def test_own_weights_come_back_after_an_exception() -> None:
    m = model()
    ema = StandardEma(named(m))
    move(m, 1)
    own, average = weights(m), [w.clone() for w in ema.averages().values()]
    with pytest.raises(ZeroDivisionError), ema.swapped_in():
        raise ZeroDivisionError
    assert all(map(torch.equal, m.parameters(), own))
    assert all(map(torch.equal, ema.averages().values(), average))


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    m = model()
    ema = StandardEma(named(m), decay=0.9)
    for step in (1, 2, 3):
        move(m, step)
        ema.update(step)
    saved = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    saved.bind(ema=ema)
    saved.save(3)
    saved.finish()
    other = StandardEma(named(model(seed=1)), decay=0.9)
    fresh = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    fresh.bind(ema=other)
    fresh.load_latest()
    assert other.averages().keys() == ema.averages().keys()
    assert all(map(torch.equal, other.averages().values(), ema.averages().values()))


def test_loading_copies_and_does_not_share() -> None:
    ema, other = StandardEma(named(model())), StandardEma(named(model(1)))
    other.load_state_dict(ema.state_dict())
    other.update(1)
    assert not all(map(torch.equal, other.averages().values(), ema.averages().values()))


def test_average_of_another_model_is_refused() -> None:
    state = StandardEma(named(nn.Linear(3, 4))).state_dict()
    with pytest.raises(KeyError, match="another model"):
        StandardEma(named(model())).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"ema\.decay"):
        config.check(config.compose([f"ema.decay={decay}"]))


def test_without_an_average_the_trained_weights_are_taken() -> None:
    m = model()
    ema = NoEma(named(m))
    move(m, 1)
    ema.update(1)
    with ema.swapped_in():
        assert all(map(torch.equal, m.parameters(), ema.averages().values()))
    assert not any(w.requires_grad for w in ema.averages().values())
