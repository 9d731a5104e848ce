"""One step of the tiny model with each arm of experiment=memory: what is kept, and how far the loss moves.

python experiments/memory/count.py      prints a table; the batch is the experiment's, on 128 x 128 canvases
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nai_xl import config
from nai_xl.memory import process_wide
from nai_xl.model.tiny import tiny_sdxl

FURTHER = "[sdpa,bf16_weights]"  # needs an optimizer of its own, and so is no arm


def step(cfg: DictConfig) -> tuple[float, int, float]:
    """The loss, bytes that the forward pass keeps beside weights (shared memory once), the sum of the tolerances."""
    unet = tiny_sdxl(seed=0).unet.train()
    actions = config.build(cfg.memory)
    for action in actions.values():
        action.apply(unet)
    batch, edge = cfg.run.batch_size, cfg.native.resolution // 8
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, batch, 4, edge, edge, generator=draw)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=draw)
    t = torch.randint(1000, (batch,), generator=draw)
    added = {"text_embeds": context[:, 0, :96], "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * batch)}
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(x, t, context, added_cond_kwargs=added).sample
        loss = (out.double() - noise).square().mean()
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return loss.item(), sum(sizes.values()), sum(a.tolerance for a in actions.values())


def main() -> None:
    first = None
    print("| arm | kept for the backward pass, MiB | loss moves by | tolerance |\n|---|---|---|---|")
    asked = ["experiment=memory", "run.seed=0"]
    points = [*config.combinations(asked), *config.combinations([*asked, f"memory={FURTHER}"])]
    for _, _, cfg in points:
        with process_wide.restored():
            loss, kept, tolerance = step(cfg)
        first = loss if first is None else first
        # its own hooks see the tensors before the ones here do; on a CPU it leaves them where they are
        size = "as sdpa" if "offload_activations" in cfg.memory else f"{kept / 2**20:.1f}"
        moved = abs(loss - first) / first
        print(f"| {','.join(cfg.memory)} | {size} | {moved:.1e} | {tolerance:g} |", flush=True)


if __name__ == "__main__":
    main()
