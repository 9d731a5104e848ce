"""Compiled blocks compute what they did, keep less for the backward pass, and leave nothing behind for the next run."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory import compile as compiled
from nai_xl.memory import process_wide
from nai_xl.memory.activation_budget import ActivationBudget
from nai_xl.memory.compile import Compile
from nai_xl.model.tiny import UNET_CONFIG, tiny_sdxl
from tests.memory.test_bf16_weights import example

SETTINGS = {
    "recompile_limit": torch._dynamo.config,
    "fail_on_recompile_limit_hit": torch._dynamo.config,
    "optimize_ddp": torch._dynamo.config,
    "activation_memory_budget": torch._functorch.config,
}


def settings() -> dict[str, Any]:
    return {name: getattr(owner, name) for name, owner in SETTINGS.items()}


def transformer() -> tuple[nn.Module, dict[str, Tensor]]:
    """One of SDXL's transformer blocks of width 640, and the input that it has at 256 x 256 pixels and batch 4."""
    block = BasicTransformerBlock(640, 10, 64, cross_attention_dim=2048)
    return block, {"hidden_states": torch.randn(1, 1024, 640), "encoder_hidden_states": torch.randn(1, 77, 2048)}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    block = ResnetBlock2D(in_channels=64, out_channels=64, temb_channels=128, groups=16)
    return block, {"input_tensor": torch.randn(2, 64, 16, 16), "temb": torch.randn(2, 128)}


class Step(NamedTuple):
    loss: float
    gradient: Tensor  # of the block's input
    saved: int  # bytes kept for the backward pass beside weights and inputs
    products: Counter[str]  # matrix products and convolutions of the forward and the backward graph


def counting(products: Counter[str]) -> Any:
    """A backend that runs torch's own forward and backward graphs as they are, and counts what is in them."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        products.update(n for n in names if n.startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution")))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


def step(
    kind: Callable[[], tuple[nn.Module, dict[str, Tensor]]], *actions: Any, monkeypatch: pytest.MonkeyPatch
) -> Step:
    torch.manual_seed(0)
    block, inputs = kind()
    model = nn.ModuleList([block])
    products: Counter[str] = Counter()
    monkeypatch.setattr(compiled, "BACKEND", counting(products))
    first = next(iter(inputs.values())).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs.values())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with process_wide.restored():
        for action in actions:
            action.apply(model)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = block(**inputs).square().mean()
        saved = sum(size for place, size in kept.items() if place not in own)
        loss.backward()
    assert first.grad is not None
    return Step(loss.item(), first.grad, saved, products)


@pytest.mark.parametrize(("kind", "share"), [(transformer, 0.65), (resnet, 0.35)])
def test_half_the_budget_keeps_less_and_repeats_no_product(
    kind: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = step(kind, monkeypatch=monkeypatch)
    whole = step(kind, Compile(), monkeypatch=monkeypatch)
    half = step(kind, ActivationBudget(budget=0.5), Compile(), monkeypatch=monkeypatch)
    assert half.saved < share * whole.saved and whole.saved <= eager.saved
    assert half.products == whole.products and whole.products.total() >= 4
    for found in (whole, half):
        assert found.loss == pytest.approx(eager.loss, rel=Compile.tolerance)
        torch.testing.assert_close(found.gradient, eager.gradient, rtol=1e-4, atol=1e-4 * eager.gradient.std().item())


def test_the_order_of_the_two_actions_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one = step(resnet, Compile(), ActivationBudget(), monkeypatch=monkeypatch)
    other = step(resnet, ActivationBudget(), Compile(), monkeypatch=monkeypatch)
    assert one.saved == other.saved


def test_a_later_run_inherits_neither_settings_nor_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    alone = step(resnet, Compile(), monkeypatch=monkeypatch)
    same = compiled.BACKEND
    step(resnet, Compile(), ActivationBudget(), monkeypatch=monkeypatch)
    assert settings() == before
    with monkeypatch.context() as patch:  # the very same backend object: torch would find the earlier graphs by it
        patch.setattr(f"{__name__}.counting", lambda _: same)
        assert step(resnet, Compile(), ActivationBudget(), monkeypatch=monkeypatch).saved < alone.saved
        assert step(resnet, Compile(), monkeypatch=monkeypatch).saved == alone.saved


def test_settings_come_back_after_a_run_that_failed() -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="mishap"), process_wide.restored():
        for action in (ActivationBudget(budget=0.3), ActivationBudget(budget=0.7), Compile()):
            action.apply(nn.Identity())
        assert settings()["activation_memory_budget"] == 0.7 and settings() != before
        raise RuntimeError("mishap")
    assert settings() == before


def unet_step(unet: Any, height: int, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    unet.zero_grad()
    loss = unet(**example(height, width)).sample.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture
def scope() -> Iterator[None]:
    with process_wide.restored():
        yield


def small_unet() -> Any:
    """One transformer block and three ResNet blocks on the way down, half as wide as the tiny model's."""
    changes = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "block_out_channels": (32,),
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**UNET_CONFIG, **changes}).train()


def assert_equal_steps(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=Compile.tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    whole = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


@pytest.mark.usefixtures("scope")
def test_blocks_share_graphs_over_buckets_and_compute_the_same() -> None:
    plain, unet = (tiny_sdxl(seed=0).unet.train() for _ in range(2))
    counters.clear()
    Compile().apply(unet)
    made = []
    for size in [(16, 16), (12, 20), (20, 12), (8, 24)]:
        assert_equal_steps(unet_step(unet, *size), unet_step(plain, *size))
        made.append(counters["stats"]["unique_graphs"])
    # 11 transformer blocks in 2 widths, 11 ResNet blocks in 10 kinds: one graph each for the first shape; the second
    # shape needs one more for those whose sizes had not varied yet; no further shape needs any
    assert made == [12, 14, 14, 14]
    assert not counters["graph_break"]


CHECKPOINTED = [["gradient_checkpointing"], ["gradient_checkpointing", "channels_last"], ["offload_activations"]]


@pytest.mark.usefixtures("scope")
@pytest.mark.parametrize("others", CHECKPOINTED, ids="+".join)
def test_together_with_other_actions(others: list[str]) -> None:
    plain, unet = small_unet(), small_unet()
    cfg = config.compose([f"memory=[{','.join([*others, 'compile', 'activation_budget'])}]"])
    for action in config.build(cfg.memory).values():
        action.apply(unet)
    for size in [(16, 16), (12, 20)]:
        assert_equal_steps(unet_step(unet, *size), unet_step(plain, *size))


@pytest.mark.usefixtures("scope")
def test_compiling_too_often_is_told_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "GRAPHS", 1)
    unet = small_unet()
    Compile(dynamic=False).apply(unet)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        unet_step(unet, 16, 16)


@pytest.mark.usefixtures("scope")
def test_under_autocast() -> None:
    plain, unet = small_unet(), small_unet()
    Compile().apply(unet)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = unet_step(unet, 16, 16)[0], unet_step(plain, 16, 16)[0]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@pytest.mark.usefixtures("scope")
def test_the_whole_network_as_one_graph() -> None:
    plain, unet = small_unet(), small_unet()
    counters.clear()
    Compile(regional=False).apply(unet)
    torch.testing.assert_close(unet_step(unet, 16, 16)[0], unet_step(plain, 16, 16)[0], rtol=1e-4, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sigmoid()


@pytest.mark.usefixtures("scope")
def test_finished_kernels_are_kept_in_the_cache_directory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("NAI_XL_CACHE", str(tmp_path))
    losses, hits = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model, x = Small(), torch.randn(4, 8)
        eager = model(x).square().mean().item()
        counters.clear()
        Compile(regional=False).apply(model)
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
        assert losses[-1] == pytest.approx(eager, rel=Compile.tolerance)
    assert hits == [0, 1] and losses[0] == losses[1]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled") and any(
        (tmp_path / "compiled").iterdir()
    )


def test_no_compiler_is_told_before_anything_is_loaded(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    Spec.of(small("memory=[compile]"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"C\+\+ compiler.*set '~memory\.compile'"):
        Spec.of(small("memory=[compile]"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"pip install triton.*set '~memory\.compile'"):
        Spec.of(small("memory=[compile]"))


def test_a_budget_without_compiled_blocks_is_refused(small: Callable[..., DictConfig]) -> None:
    with pytest.raises(UserError, match=r"memory=\[\.\.\.,compile\].*'~memory\.activation_budget'"):
        Spec.of(small("memory=[activation_budget]"))
    Spec.of(small("memory=[activation_budget,compile]"))


@pytest.mark.parametrize("budget", ["-0.1", "1.5"])
def test_impossible_budget_is_refused(budget: str, small: Callable[..., DictConfig]) -> None:
    with pytest.raises(UserError, match=r"memory\.activation_budget\.budget"):
        small("memory=[activation_budget,compile]", f"memory.activation_budget.budget={budget}")
