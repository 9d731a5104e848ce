"""An autoencoder that is trained: pixels in, pixels out, as one function that any strategy can wrap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from diffusers import AutoencoderKL
from torch import Tensor

from nai_xl.files import replace_folder


class TrainableAutoencoder(AutoencoderKL):
    """AutoencoderKL whose call paints a picture again. An existing one becomes one by its class."""

    latent_noise: float
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "decode")  # called beside forward, by evaluators

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W], noise [B,4,H/8,W/8] -> the picture painted again, and its raw latents, both float32.

        `latent_noise` times each channel's deviation is the noise's share in what is decoded.
        """
        latents = self.encode(pixels).latent_dist.mean.float()
        deviation = latents.std((0, 2, 3)).detach().view(1, -1, 1, 1)
        painted = self.decode(latents + self.latent_noise * deviation * noise).sample
        return painted.float(), latents


def trainable_autoencoder(vae: AutoencoderKL, *, latent_noise: float) -> TrainableAutoencoder:
    """The same object, to be trained."""
    vae.__class__ = TrainableAutoencoder
    vae.latent_noise = latent_noise
    return vae


def save_autoencoder(vae: TrainableAutoencoder, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `weights`, all of the autoencoder's, as the diffusers folder `folder`/vae; an old `folder` is replaced.

    `vae` is a plain AutoencoderKL afterwards.
    """
    vae.__class__ = AutoencoderKL
    vae.to("cpu").load_state_dict(dict(weights))
    replace_folder(folder, lambda aside: vae.save_pretrained(aside / "vae", safe_serialization=True))
