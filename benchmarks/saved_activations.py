"""What memory options keep for the backward pass of full-size SDXL, and their FLOPs: counted, on the meta device.

python benchmarks/saved_activations.py [pixels]    prints the table of docs/memory.md; no weights and no GPU needed
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import Sdpa
from nai_xl.memory.channels_last import ChannelsLast
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.optimizer import dry_run

ROWS: dict[str, list[MemoryAction]] = {
    "math": [Sdpa("math")],
    "sdpa": [Sdpa()],
    "sdpa, channels_last": [Sdpa(), ChannelsLast()],
    **{
        f"sdpa, gradient_checkpointing, blocks={blocks}": [Sdpa(), GradientCheckpointing(blocks)]
        for blocks in ("ff", "transformer", "all")
    },
}
OPTIONS: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
MATH = F.scaled_dot_product_attention  # what the meta device takes it for


def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def forward(unet: UNet2DConditionModel, edge: int) -> Tensor:
    added = {"text_embeds": torch.empty(1, 1280, **OPTIONS), "time_ids": torch.empty(1, 6, **OPTIONS)}
    x, context = torch.empty(1, 4, edge, edge, **OPTIONS), torch.empty(1, 77, 2048, **OPTIONS)
    return unet(x, torch.zeros(1, device="meta"), context, added_cond_kwargs=added).sample


def count(actions: list[MemoryAction], edge: int) -> tuple[int, int, int]:
    """Bytes saved, bytes saved if every layer had its own copy, FLOPs of forward and backward pass."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_BASE / "unet"))
    unet = unet.to(torch.bfloat16).train()
    for action in actions:
        action.apply(unet)
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(unet, edge)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    each = sum(tensor.nbytes for tensor in kept)
    kept.clear()
    with FlopCounterMode(display=False) as counter:
        forward(unet, edge).sum().backward()
    return sum(storages.values()), each, counter.get_total_flops()


def main(pixels: int) -> None:
    print("| options | saved, GiB | one copy for each layer, GiB | forward and backward, TFLOP |\n|---|---|---|---|")
    for name, actions in ROWS.items():
        kernel = MATH if name == "math" else flash
        with (
            dry_run.of_a_gpu(),
            mock.patch.object(F, "scaled_dot_product_attention", kernel),
        ):  # as on a GPU
            saved, each, flops = count(actions, pixels // 8)
        print(f"| {name} | {saved / 2**30:.2f} | {each / 2**30:.2f} | {flops / 1e12:.2f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
