"""The training step alone: UNet, mean squared error on the noise, clip, fused AdamW; run by peers_launch.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from nai_xl.diffusion.schedule import scaled_linear
from nai_xl.model.sdxl import load_sdxl


def main(model: str, batch: int, edge: int, precision: str, checkpointing: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = load_sdxl(Path(model)).unet.to(device).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    schedule = scaled_linear()
    torch.manual_seed(0)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim, device=device)
    sizes = torch.tensor([[edge, edge, 0, 0, edge, edge]] * batch, device=device)
    condition = {"text_embeds": torch.randn(batch, pooled, device=device), "time_ids": sizes.float()}
    latents = torch.randn(batch, 4, edge // 8, edge // 8, device=device)
    while True:  # the clock ends it
        noise = torch.randn_like(latents)
        level = schedule.at(torch.randint(0, 1000, (batch,), device=device))
        noisy = schedule.add_noise(latents, noise, level)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = unet(noisy, level.t, context, added_cond_kwargs=condition, return_dict=False)[0]
        nn.functional.mse_loss(prediction.float(), noise).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "True")
