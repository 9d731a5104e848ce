"""float8 feed-forward layers: their rounding, where it is, and the machines that have no kernels for it."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory import fp8_ff
from nai_xl.memory.fp8_ff import Fp8FeedForward
from nai_xl.model.tiny import tiny_sdxl
from tests.memory.test_bf16_weights import assert_stays_close

Compose = Callable[..., DictConfig]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
def test_loss_and_gradients_stay_close_and_names_the_same() -> None:
    assert_stays_close(Fp8FeedForward(emulate=True))


@needs_torchao
def test_float8_is_in_feed_forward_layers_alone() -> None:
    unet = tiny_sdxl(seed=0).unet
    names = {name: type(module) for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    parameters = {name: p.dtype for name, p in unet.named_parameters()}
    Fp8FeedForward(emulate=True).apply(unet)
    changed = {name for name, kind in names.items() if type(unet.get_submodule(name)) is not kind}
    assert changed == {name for name in names if name.endswith(("ff.net.0.proj", "ff.net.2"))} and len(changed) == 22
    assert {name: p.dtype for name, p in unet.named_parameters()} == parameters


@needs_torchao
def test_float8_products_are_those_of_rounded_factors() -> None:
    """Against e4m3 by the definition: 3 bits of mantissa, the largest value 448 at the tensor's own largest."""

    def rounded(x: Tensor) -> Tensor:
        scale = 448 / x.abs().max().double()
        scaled = x.double() * scale
        step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6))) - 3)
        return (scaled / step).round() * step / scale

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = nn.ModuleDict({"net": nn.Linear(32, 48, bias=False)})

    torch.manual_seed(0)
    block, x = nn.ModuleDict({"block": Block()}), torch.randn(16, 32)
    Fp8FeedForward(emulate=True).apply(block)
    linear = block["block"].ff["net"]
    expected = rounded(x) @ rounded(linear.weight.detach()).T
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(linear(x), x @ linear.weight.T, rtol=1e-3)


@needs_torchao
@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6)])
def test_float8_without_kernels_is_refused(
    capability: tuple[int, int] | None, small: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(fp8_ff, "_capability", lambda: capability)
    with pytest.raises(UserError, match=r"8\.9 or newer.*'~memory\.fp8_ff'.*memory\.fp8_ff\.emulate=true"):
        Spec.of(small("memory=[fp8_ff]"))
    Spec.of(small("memory=[fp8_ff]", "memory.fp8_ff.emulate=true"))


@needs_torchao
def test_float8_is_built_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8_ff, "_capability", lambda: (9, 0))
    Fp8FeedForward()


def test_float8_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install torchao, or set '~memory\.fp8_ff'"):
        Fp8FeedForward(emulate=True)
