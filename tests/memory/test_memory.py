"""Memory options change how a step is computed, not what it learns. A new yaml is covered by itself."""

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.memory.action import MemoryAction
from nai_xl.model.tiny import tiny_sdxl

OPTIONS = sorted(path.stem for path in (config.conf_dir() / "memory").glob("*.yaml"))
NEED_A_GPU = {"cudnn", "fp8_ff"}
COMPILED = {"compile", "activation_budget"}  # slow: their pairs are chosen in test_memory_compiled
Step = tuple[Tensor, dict[str, Tensor]]


def actions(choice: str) -> list[MemoryAction]:
    cfg = config.compose([f"memory={choice}"])
    config.check(cfg)
    return list(config.build(cfg.memory).values()) if cfg.get("memory") else []


@functools.cache
def refusal(option: str) -> str | None:
    """Why this machine cannot run an option."""
    try:
        actions(f"[{option}]")
    except UserError as error:
        return str(error)
    return None


def is_attention(option: str) -> bool:
    return refusal(option) is None and any(a.attention for a in actions(f"[{option}]"))


def pairs() -> list[str]:
    """Every two options that may stand together, of those that run here."""
    able = [o for o in OPTIONS if refusal(o) is None and o not in COMPILED and len(actions(f"[{o}]")) == 1]
    return [f"{a},{b}" for a, b in itertools.combinations(able, 2) if not (is_attention(a) and is_attention(b))]


def plain_unet() -> nn.Module:
    unet = tiny_sdxl(seed=0).unet.train()
    unet.set_attn_processor(AttnProcessor())  # plain matrix products, for the actions to differ from
    return unet


def loss_of(unet: nn.Module) -> Tensor:
    """The loss of one training step on fixed random numbers."""
    x, noise = torch.randn(2, 2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    added = {"text_embeds": context[:, 0, :96], "time_ids": torch.tensor([[96.0, 160, 0, 0, 96, 160]] * 2)}
    out = unet(x, torch.tensor([100, 999]), context, added_cond_kwargs=added).sample
    return (out - noise).square().mean()


def step(chosen: list[MemoryAction]) -> Step:
    """Loss and gradients of one training step of the tiny UNet."""
    unet = plain_unet()
    for action in chosen:
        action.apply(unet)
    loss = loss_of(unet)
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    with process_wide.restored():
        yield


@pytest.fixture(scope="module")
def plain() -> Step:
    return step([])


def assert_same(found: Step, expected: Step, tolerance: float) -> None:
    """The loss within `tolerance`, every gradient within ten times that: more roundings lie on its way."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    whole = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * (10 * gradient.norm() + whole / 10), name


@pytest.mark.parametrize("option", OPTIONS)
def test_option_leaves_loss_and_gradients_as_they_were(option: str, plain: Step) -> None:
    if refusal(option):
        assert option in NEED_A_GPU
        pytest.skip(f"not on this machine: {refusal(option)}")
    chosen = actions(f"[{option}]")
    assert chosen
    assert_same(step(chosen), plain, sum(action.tolerance for action in chosen))


@pytest.mark.parametrize("pair", pairs())
def test_two_options_together_leave_loss_and_gradients_as_they_were(pair: str, plain: Step) -> None:
    chosen = actions(f"[{pair}]")
    assert_same(step(chosen), plain, sum(action.tolerance for action in chosen))


def test_all_options_together_leave_loss_and_gradients_as_they_were(plain: Step) -> None:
    able = [option for option in OPTIONS if refusal(option) is None and not is_attention(option)]
    chosen = actions(f"[{','.join([*able, 'sdpa'])}]")
    assert_same(step(chosen), plain, sum(action.tolerance for action in chosen))


def test_no_option_is_a_choice_too() -> None:
    assert actions("[]") == []


@pytest.mark.parametrize("option", [option for option in OPTIONS if refusal(option) is None])
def test_option_renames_no_weight(option: str) -> None:
    """Checkpoints, averages and the exported pipeline read and write diffusers' names."""
    unet = plain_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for action in actions(f"[{option}]"):
        action.apply(unet)
    after = unet.state_dict()
    assert list(after) == list(before) and list(dict(unet.named_parameters())) == list(before)
    unet.load_state_dict({name: torch.full_like(tensor, 0.5) for name, tensor in before.items()})
    assert all((parameter == 0.5).all() for parameter in unet.parameters())
