"""Pixels to latents and back; the autoencoder with a normalisation folded into its weights."""

from __future__ import annotations

import copy
import math

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from nai_xl.errors import UserError


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """[B,3,H,W] in [-1,1] -> raw latents [B,4,H/8,W/8] float32: the posterior's mean, not one sample of it.

    Raises UserError if a latent is not finite.
    """
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float().cpu()
    if not latents.isfinite().all():
        narrow = vae.dtype != torch.float32 or torch.is_autocast_enabled(vae.device.type)
        cure = "; set latents.dtype=fp32" if narrow else ", although its weights are; leave these pictures out"
        raise UserError(f"the autoencoder gave latents that are not finite{cure}")
    return latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, raw: Tensor) -> list[Image.Image]:
    """Raw latents [B,4,h,w] -> B images."""
    pixels = vae.decode(raw.to(vae.device, vae.dtype)).sample.float().cpu()
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in bytes_]


@torch.no_grad()
def folded(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """An autoencoder whose own latents, times its scaling_factor, are (raw - mean) / std; mean, std [C,1,1].

    Normalisation by one number is what the scaling_factor is for: the weights stay as they are. Any other goes into the
    1x1 convolutions on both sides of the latent: quant_conv gives (raw - mean) / (std x factor), with the variance that
    belongs to it, and post_quant_conv takes it back. The factor stays: readers of single files (ComfyUI, diffusers)
    take SDXL's for granted. `vae` itself is not changed; it is returned where there is nothing to change.
    """
    mean, std = mean.flatten().double().cpu(), std.flatten().double().cpu()
    own = vae.config.scaling_factor
    plain = not mean.any() and bool((std == std[0]).all())
    if plain and math.isclose(own * std[0], 1, rel_tol=1e-6) and vae.config.get("latents_mean") is None:
        return vae
    vae = copy.deepcopy(vae)
    # some autoencoders bring statistics for diffusers to apply; training does not
    vae.register_to_config(latents_mean=None, latents_std=None)
    if plain:
        vae.register_to_config(scaling_factor=float(f"{1 / std[0]:.7g}"))  # the decimals of float32
    else:
        _fold(vae, mean, std * own)
    return vae


def _fold(vae: AutoencoderKL, mean: Tensor, scale: Tensor) -> None:
    """Make the autoencoder's latents (raw - mean) / scale, [C] float64. Computed in float64."""
    channels = len(mean)
    if vae.quant_conv is None:
        vae.quant_conv = _identity(2 * channels).to(vae.device, vae.dtype)
    if vae.post_quant_conv is None:
        vae.post_quant_conv = _identity(channels).to(vae.device, vae.dtype)
    vae.register_to_config(use_quant_conv=True, use_post_quant_conv=True)
    out, back = vae.quant_conv, vae.post_quant_conv
    mean, scale = mean.to(out.weight.device), scale.to(out.weight.device)
    weight, bias = out.weight.double(), out.bias.double()
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / scale
    bias[channels:] -= 2 * scale.log()  # these rows are the log variance
    out.weight.copy_(weight), out.bias.copy_(bias)
    weight, bias = back.weight.double(), back.bias.double()
    back.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    back.weight.copy_(weight * scale[:, None, None])


def _identity(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that changes nothing."""
    conv = nn.Conv2d(channels, channels, 1).requires_grad_(False)
    conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    conv.bias.zero_()  # type: ignore[union-attr]
    return conv
