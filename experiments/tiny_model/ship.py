"""Bring a run of recipe=tiny_vae into the form in which model=tiny ships, and judge it by three photographs.

    python experiments/tiny_model/ship.py outputs/<run> nai_xl/assets

The photographs come with packages that mlflow installs anyway (scikit-learn: china, flower; matplotlib: grace_hopper)
and are never trained on. fp16 weights are written, and the config with the scaling factor that gives the latents of the
embedded photographs unit variance.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib
import sklearn
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from nai_xl.data.images import to_pixels
from nai_xl.data.source.sample import SampleSource
from nai_xl.evals.reconstruction import psnr
from nai_xl.model.tiny import vae_config
from nai_xl.model.vae import decode_latents, encode_pixels

NOISE = 0.03  # recipe=tiny_vae's task.latent_noise
AREA = 128 * 128  # pixels of a canvas of model=tiny


def judges() -> dict[str, Path]:
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    return {
        "china": images / "china.jpg",
        "flower": images / "flower.jpg",
        "grace_hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    }


def on_tiny_canvas(path: Path) -> torch.Tensor:
    """[1,3,H,W] in [-1,1]: the whole photograph in multiples of 32 pixels."""
    image = Image.open(path).convert("RGB")
    factor = math.sqrt(AREA / (image.width * image.height))
    size = [max(32, round(side * factor / 32) * 32) for side in image.size]
    return to_pixels(image.resize((size[0], size[1]), Image.Resampling.LANCZOS))[None]


def main(run: Path, folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(run / "pipeline" / "vae", local_files_only=True).eval()
    for name, path in judges().items():
        pixels = on_tiny_canvas(path)
        again = to_pixels(decode_latents(vae, encode_pixels(vae, pixels))[0])
        print(f"{name}: {psnr(pixels[0], again):.2f} dB")
    items = SampleSource().scan().items
    std = torch.cat([encode_pixels(vae, on_tiny_canvas(item.path)).flatten(2) for item in items], dim=2).std().item()
    weights = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    # the posterior's variance was not trained: say the noise that the decoder knows
    weights["quant_conv.weight"][4:] = 0
    weights["quant_conv.bias"][4:] = 2 * math.log(NOISE * std)
    save_file(weights, folder / "tiny_vae.safetensors")
    config = dict(vae_config(), scaling_factor=round(1 / std, 4))
    (folder / "tiny_vae.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
