"""What the options on the model save and what they cost, as exact counts."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils.flop_counter import FlopCounterMode

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory import attention, gradient_checkpointing, offload_activations
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import AttentionSlicing, Sdpa
from nai_xl.memory.channels_last import ChannelsLast
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from nai_xl.memory.offload_activations import OffloadActivations
from tests.memory.test_memory import loss_of, plain_unet


def unet_with(*actions: MemoryAction) -> UNet2DConditionModel:
    unet = plain_unet()
    for action in actions:
        action.apply(unet)
    return unet


def saved_bytes(*actions: MemoryAction) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out and shared memory counted once."""
    unet = unet_with(*actions)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, lest their addresses be used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(unet)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@functools.cache
def flops(*actions: MemoryAction) -> int:
    """Of one forward and backward pass."""
    unet = unet_with(Sdpa(), *actions)
    with FlopCounterMode(display=False) as counter:
        loss_of(unet).backward()
    return counter.get_total_flops()


# --- gradient checkpointing -------------------------------------------------------------------------------------------


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


# --- attention --------------------------------------------------------------------------------------------------------


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


# --- memory order -----------------------------------------------------------------------------------------------------


def is_nhwc(tensor: Tensor) -> bool:
    """Channels are neighbours in memory; part of a concatenation, which has gaps between pixels, counts as well."""
    return tensor.stride(1) == 1


def orders(unet: nn.Module) -> Counter[str]:
    """How many tensors enter and leave convolutions and norms, forward and backward, in which order."""
    found: Counter[str] = Counter()

    def look(name: str, tensor: Tensor) -> None:
        if tensor.shape[1] > 4:  # the latents are what the loader made them, and 4 channels are little to turn
            found[f"{name} {'nhwc' if is_nhwc(tensor) else 'nchw'}"] += 1

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        look("in", args[0])
        look("out", out)
        out.register_hook(functools.partial(look, "gradient"))

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(hook)
    loss_of(unet).backward()
    return found


def test_activations_keep_channels_last_order_throughout() -> None:
    found = orders(unet_with(Sdpa(), ChannelsLast()))
    assert {name for name in found if name.endswith("nchw")} == set()
    assert found["in nhwc"] > 60 and found["gradient nhwc"] > 60
    # what moving the weights alone comes to: the test can tell the difference
    assert orders(unet_with(Sdpa()).to(memory_format=torch.channels_last))["in nchw"] == 24


def test_channels_last_swaps_every_block_and_nothing_in_its_weights() -> None:
    unet, before = unet_with(ChannelsLast()), plain_unet()
    assert unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel | nn.GroupNorm):
            assert type(module).__name__.startswith("ChannelsLast")
            assert isinstance(module, type(before.get_submodule(name)))


# --- offloading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that goes to the host; the CPU is taken for a device with memory of its own."""
    seen: list[Tensor] = []
    monkeypatch.setattr(offload_activations, "stays", lambda device: False)
    real = offload_activations.park
    monkeypatch.setattr(offload_activations, "park", lambda tensor: (seen.append(tensor), real(tensor))[1])
    return seen


@pytest.mark.parametrize("more", [[], [GradientCheckpointing("all")], [ChannelsLast()]])
def test_offloaded_activations_give_the_same_gradients(more: list[MemoryAction], parked: list[Tensor]) -> None:
    min_bytes = 4096
    unet, expected = unet_with(Sdpa(), *more, OffloadActivations(min_bytes)), unet_with(Sdpa(), *more)
    for model in (unet, expected):
        loss_of(model).backward()
    for found, other in zip(unet.parameters(), expected.parameters(), strict=True):
        # half of a gated layer comes back without the gaps that it had, and vector loops end elsewhere
        assert (found.grad - other.grad).norm() <= 1e-5 * (other.grad.norm() + 1e-3)
    assert len(parked) > 10 and min(tensor.nbytes for tensor in parked) >= min_bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_are_not_offloaded(autocast: bool, parked: list[Tensor]) -> None:
    """Nor the half-precision copies of them that autocast makes, as large together as the model."""
    unet = unet_with(Sdpa(), OffloadActivations(1))
    storages = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in unet.parameters() if parameter.ndim == 4}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(unet)
    loss.backward()
    assert parked and not storages & {tensor.untyped_storage().data_ptr() for tensor in parked}
    assert not shapes & {tuple(sorted(tensor.shape)) for tensor in parked}


def test_what_is_small_stays_and_so_does_everything_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[Tensor] = []
    monkeypatch.setattr(offload_activations, "park", went.append)
    loss_of(unet_with(OffloadActivations(1))).backward()
    monkeypatch.setattr(offload_activations, "stays", lambda device: False)
    loss_of(unet_with(OffloadActivations(1 << 40))).backward()
    assert went == []


def test_hooks_are_closed_when_a_forward_pass_fails(parked: list[Tensor]) -> None:
    unet = unet_with(OffloadActivations(1))
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError)):
        unet(torch.zeros(1, 4, 8, 8), 1, None)
    parked.clear()
    (torch.ones(8, requires_grad=True) ** 2).sum().backward()
    assert parked == []


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_parked_tensor_comes_back_with_its_strides(shape: list[int], order: Any, dtype: torch.dtype) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.randn(shape).to(dtype).permute(axes)
    back = offload_activations.unpack(offload_activations.park(tensor))
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.data_ptr() != tensor.data_ptr()
