"""How attention is computed: which kernel, or slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
HALF_PRECISION = ("cudnn", "flash")  # on a GPU
AMPERE = (8, 0)  # the first compute capability that flash and cuDNN attention run on


@dataclass(frozen=True)
class Sdpa(MemoryAction):
    """torch's scaled_dot_product_attention.

    kernel: `auto` lets torch pick for every shape; `flash` is FlashAttention (2205.14135, 2307.08691), `cudnn`
    NVIDIA's, `math` plain matrix products, which keep the attention matrix. The choice holds inside the UNet's
    attention alone. On a GPU cudnn and flash compute in half precision only. Raises UserError when built where its
    kernel cannot run.
    """

    kernel: Literal["auto", "cudnn", "flash", "math"] = "auto"
    tolerance = 1e-5  # sums in another order; relative, in float32

    def __post_init__(self) -> None:
        reason = _impossible(self.kernel)
        if reason:
            raise UserError(f"memory=[{self.kernel}]: {reason}; use memory=[sdpa], where torch picks what can run")

    @property
    def unets_only(self) -> bool:
        return self.kernel in HALF_PRECISION  # an autoencoder's single head is too wide for them

    @property
    def attention(self) -> str:
        return "sdpa" if self.kernel == "auto" else self.kernel

    def apply(self, model: Any) -> None:
        model.set_attn_processor(AttnProcessor2_0() if self.kernel == "auto" else OneKernel(self.kernel))

    def refuse_beside(self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: str) -> None:
        float32 = precision == "no" and all(action.weights_in is None for action in actions)
        if float32 and self.kernel in HALF_PRECISION and torch.cuda.is_available():
            half = f"memory=[{self.kernel}] computes in half precision"
            raise UserError(f"{half}; set precision=bf16, or memory=[sdpa]")


@dataclass(frozen=True)
class AttentionSlicing(MemoryAction):
    """Attention over `slice_size` heads of one image at a time.

    It shrinks what is alive at once in sampling. Training keeps every slice's attention matrix for the backward pass.
    """

    unets_only = True

    slice_size: Annotated[int, Field(ge=1)] = 1
    tolerance = 1e-5  # matrix products of other shapes; relative, in float32

    @property
    def attention(self) -> str:
        return "attention_slicing"

    def apply(self, model: Any) -> None:
        model.set_attention_slice(self.slice_size)


class OneKernel(AttnProcessor2_0):
    """diffusers' processor with one kernel allowed. Set around every call and not once for the whole model, since
    checkpointed blocks run again in the backward pass, and the autoencoder's wide heads fit fewer kernels.
    """

    def __init__(self, kernel: str):
        super().__init__()
        self.kernel = kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B,N,C], context [B,M,D] -> [B,N,C]. Raises UserError in float32 on a GPU, where half precision is needed."""
        if self.kernel != "math" and hidden_states.is_cuda and _precision(hidden_states) is torch.float32:
            raise UserError(f"memory=[{self.kernel}] computes in half precision; set precision=bf16 or memory=[sdpa]")
        with sdpa_kernel(KERNELS[self.kernel]):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def _precision(tensor: Tensor) -> torch.dtype:
    """What a linear layer makes of this tensor."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensor.dtype


def _impossible(kernel: str) -> str | None:
    """Why this machine cannot run a kernel. torch has flash attention for CPUs too, cuDNN is NVIDIA's."""
    gpu = torch.cuda.is_available()
    if kernel == "cudnn" and not (gpu and torch.backends.cudnn.is_available()):
        return "cuDNN attention needs an NVIDIA GPU and torch built with cuDNN"
    if kernel in ("cudnn", "flash") and gpu and torch.version.hip is None:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if capability < AMPERE:
            return f"{kernel} attention needs compute capability 8.0, and {name} has {'.'.join(map(str, capability))}"
    return None
