"""Memory actions that compute in fewer bits: bfloat16 weights, float8 matrix products, TensorFloat-32."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nai_xl.errors import UserError
from nai_xl.memory import process_wide

FP8_CAPABILITY = (8, 9)  # Ada Lovelace; torch._scaled_mm has no older kernels


@dataclass(frozen=True)
class Bf16Weights:
    """The UNet in bfloat16: half the bytes of weights and gradients, and no copies for autocast.

    Whatever precision says, nothing is cast. The optimizer must round stochastically: bfloat16 has 8 bits, so
    an update below 1/256 of a weight would be rounded away every time, but is kept on average when rounding is drawn
    (Zamirai et al., 2010.06192). The UNet takes and gives float32 as before. Timesteps and sizes are embedded from the
    numbers they are: in bfloat16 timestep 999 would be 1000, and 1333 pixels 1336.
    """

    # 8 bits round every operation by up to 2^-9; over the UNet's depth the loss of a step moves by less than
    tolerance: ClassVar[float] = 2e-2

    def apply(self, model: Any) -> None:
        nn.Module.to(model, torch.bfloat16)  # past diffusers' own, which warns of layers that SDXL has not
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        model.register_forward_pre_hook(_inputs_to_bf16(names), with_kwargs=True)
        model.register_forward_hook(_outputs_to_float32)


def _inputs_to_bf16(names: list[str]) -> Callable[..., tuple[tuple[()], dict[str, Any]]]:
    """A forward pre-hook that casts what is computed with, and leaves `timestep` and `time_ids` alone."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        for name in ("sample", "encoder_hidden_states"):
            given[name] = given[name].to(torch.bfloat16)
        added = given["added_cond_kwargs"]
        given["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].to(torch.bfloat16)}
        return (), given

    return hook


def _outputs_to_float32(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(tensor.float() for tensor in output)
    return type(output)(sample=output.sample.float())


@dataclass(frozen=True)
class Fp8FeedForward:
    """float8 matrix products in the feed-forward layers, forward and backward, with one scale per tensor and call.

    Micikevicius et al., FP8 Formats for Deep Learning, 2209.05433, by torchao.float8 (e4m3 for weights and activations,
    e5m2 for gradients). Weights stay in their own precision and keep their names. It saves time, not memory, and only
    when compiled. `emulate` computes the same rounding in wider formats, to try it where there are no such kernels.

    Raises UserError when it is built without torchao or, unless emulated, without a GPU of compute capability 8.9.
    """

    emulate: bool = False

    tolerance: ClassVar[float] = 2e-2  # 3 bits of mantissa round each factor by up to 2^-4; sums average that out

    def __post_init__(self) -> None:
        if importlib.util.find_spec("torchao") is None:
            raise UserError("memory.fp8_ff needs torchao; pip install torchao, or leave fp8_ff out of 'memory=[...]'")
        if not self.emulate and not (torch.cuda.is_available() and _capability() >= FP8_CAPABILITY):
            raise UserError(
                "memory.fp8_ff needs a GPU of compute capability 8.9 or newer (RTX 4090, L40, H100); leave fp8_ff out "
                "of 'memory=[...]', or set memory.fp8_ff.emulate=true to try its rounding without its speed"
            )

    def apply(self, model: Any) -> None:
        float8 = importlib.import_module("torchao.float8")  # an optional dependency, slow to import

        def in_feed_forward(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and ".ff." in name

        settings = float8.Float8LinearConfig(emulate=self.emulate, pad_inner_dim=True)  # tokens x batch may be odd
        float8.convert_to_float8_training(model, module_filter_fn=in_feed_forward, config=settings)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@dataclass(frozen=True)
class Tf32:
    """float32 matrix products and convolutions on a GPU with 10 bits of mantissa, several times as fast.

    NVIDIA A100 white paper (2020), TensorFloat-32; Ampere and newer, and without effect elsewhere. It matters for
    precision=fp32: autocast leaves hardly any float32 product.
    """

    tolerance: ClassVar[float] = 5e-3  # each factor is rounded by up to 2^-11

    def apply(self, model: Any) -> None:
        process_wide.change(torch.backends.cuda.matmul, "allow_tf32", True)
        process_wide.change(torch.backends.cudnn, "allow_tf32", True)
