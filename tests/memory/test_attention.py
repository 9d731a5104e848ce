"""How attention is computed: what each way keeps, where its kernel is forced, and where it cannot run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory import attention
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import AttentionSlicing, Sdpa
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from tests.memory.counted import saved_bytes, unet_with
from tests.memory.test_memory import loss_of, plain_unet


def test_sdpa_does_not_keep_the_attention_matrix() -> None:
    """The tiny UNet's own count: B x heads x N x (N + 77 tokens of text) floats in each transformer block."""
    matrices = 0
    unet = plain_unet()
    for block in (m for m in unet.modules() if isinstance(m, BasicTransformerBlock)):

        def count(module: nn.Module, args: Any, out: Tensor) -> None:
            nonlocal matrices
            batch, tokens, _ = out.shape
            matrices += 4 * batch * module.attn1.heads * tokens * (tokens + 77)

        block.register_forward_hook(count)
    loss_of(unet)
    assert saved_bytes() - saved_bytes(Sdpa()) >= 0.9 * matrices
    assert saved_bytes(Sdpa("flash")) == saved_bytes(Sdpa())


def test_plain_attention_and_slices_of_it_keep_as_much() -> None:
    """Slicing is for sampling: in training every slice's matrix waits for the backward pass."""
    assert saved_bytes(Sdpa("math")) > saved_bytes(Sdpa())
    assert saved_bytes(AttentionSlicing(1)) >= saved_bytes()


@pytest.mark.parametrize(("kernel", "backend"), [("flash", "FLASH_ATTENTION"), ("math", "MATH")])
def test_a_kernel_is_forced_inside_the_unets_attention_alone(
    kernel: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpointed block too, which runs again in the backward pass."""
    seen: list[list[SDPBackend]] = []
    torchs = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(_cur_sdpa_kernel_backends())
        return torchs(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = _cur_sdpa_kernel_backends()
    unet = unet_with(Sdpa(kernel), GradientCheckpointing("all"))
    blocks = sum(isinstance(module, BasicTransformerBlock) for module in unet.modules())
    loss_of(unet).backward()
    assert seen == [[getattr(SDPBackend, backend)]] * (2 * 2 * blocks)
    assert _cur_sdpa_kernel_backends() == before and len(before) > 1


def test_forced_kernels_are_compiled_without_a_break() -> None:
    unet = unet_with(Sdpa("flash"))
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    x, context = torch.randn(2, 12, block.dim), torch.randn(2, 77, unet.config.cross_attention_dim)
    expected = block(x, encoder_hidden_states=context)
    block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(block(x, encoder_hidden_states=context), expected)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cudnn: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)


@pytest.mark.parametrize(
    ("kernel", "capability", "cudnn", "reason"),
    [
        ("cudnn", None, True, "needs an NVIDIA GPU"),
        ("cudnn", (9, 0), False, "torch built with cuDNN"),
        ("cudnn", (7, 5), True, "compute capability 8.0, and Some GPU has 7.5"),
        ("flash", (7, 5), True, "compute capability 8.0"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_when_built(
    kernel: Any, capability: Any, cudnn: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, cudnn)
    with pytest.raises(UserError, match=reason) as refused:
        Sdpa(kernel)
    assert "memory=[sdpa]" in str(refused.value) and str(refused.value).startswith(f"memory=[{kernel}]")


@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash", "math"])
def test_a_recent_gpu_has_every_kernel(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert Sdpa(kernel).kernel == kernel


def test_two_ways_of_attention_are_refused_before_a_model_is_read(small: Callable[..., Any]) -> None:
    cfg = small("memory=[sdpa,math,channels_last]", "model=sdxl", "model.path=nowhere")
    with pytest.raises(UserError, match=r"memory=\[sdpa,math\]: .*~memory\.sdpa"):
        Spec.of(cfg)


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_slice_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=r"memory\.attention_slicing\.slice_size"):
        config.check(config.compose(["memory=[attention_slicing]", f"memory.attention_slicing.slice_size={size}"]))


def test_attention_is_what_was_chosen() -> None:
    def processors(action: MemoryAction) -> set[type]:
        return {type(processor) for processor in unet_with(action).attn_processors.values()}

    assert {kind.__name__ for kind in processors(Sdpa())} == {"AttnProcessor2_0"}
    assert processors(Sdpa("math")) == {attention.OneKernel}
    assert {kind.__name__ for kind in processors(AttentionSlicing())} == {"SlicedAttnProcessor"}
