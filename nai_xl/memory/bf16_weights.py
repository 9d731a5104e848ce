"""bfloat16 weights: half the bytes, and an optimizer that rounds stochastically."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction
from nai_xl.optimizer.rounding import rounds_stochastically


@dataclass(frozen=True)
class Bf16Weights(MemoryAction):
    """The UNet in bfloat16: half the bytes of weights and gradients, and no copies for autocast.

    Whatever precision says, nothing is cast. The optimizer must round stochastically: bfloat16 has 8 bits, so
    an update below 1/256 of a weight would be rounded away every time, but is kept on average when rounding is drawn
    (Zamirai et al., 2010.06192). The UNet takes and gives float32 as before. Timesteps and sizes are embedded from the
    numbers they are: in bfloat16 timestep 999 would be 1000, and 1333 pixels 1336.
    """

    unets_only = True

    # Operations round by up to 2^-9; over the UNet's depth a step's loss moves by less than this.
    tolerance = 2e-2
    weights_in = torch.bfloat16

    def apply(self, model: Any) -> None:
        nn.Module.to(model, torch.bfloat16)  # past diffusers' own, which warns of layers that SDXL has not
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        model.register_forward_pre_hook(_inputs_to_bf16(names), with_kwargs=True)
        model.register_forward_hook(_outputs_to_float32)

    def refuse_beside(self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: str) -> None:
        if precision == "fp16":
            raise UserError("memory=bf16_weights computes in bfloat16; set precision=bf16 or precision=fp32")
        if not rounds_stochastically(optimizer):
            raise UserError(
                "memory=bf16_weights needs an optimizer that rounds stochastically: rounding to nearest would drop "
                "every update below 1/256 of its weight. Set optimizer=adamw_bf16, adamw8bit or adafactor."
            )


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
