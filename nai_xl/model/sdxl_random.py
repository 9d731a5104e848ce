"""model=sdxl_random: SDXL in full size with random weights, for measuring speed and memory without a download."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from nai_xl.interfaces import declare
from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.configs import SDXL_BASE, check_parts, text_config, text_parameters, unet_skeleton
from nai_xl.model.sdxl.files import read_json
from nai_xl.model.sdxl.tokenizers import load_tokenizers

OPTION = "model.config"


def random_skeleton(config: Path | None = None) -> UNet2DConditionModel:
    """The UNet without storage."""
    return unet_skeleton(config or SDXL_BASE)


def random_text_parameters(config: Path | None = None) -> int:
    """Parameters of both text encoders."""
    return text_parameters(config or SDXL_BASE)


@declare(without_effect=("config",), skeleton=random_skeleton, text_parameters=random_text_parameters)
def sdxl_random(*, seed: int, config: Path | None = None) -> Components:
    """Every part of an SDXL model with weights drawn from `seed`, float32, on the CPU, in eval mode.

    `config` is a folder laid out like a diffusers model whose weights are not needed (unet/config.json, ...,
    tokenizer/, tokenizer_2/): SDXL base 1.0's own where it is None, which has 3.5 billion parameters, 14 GB. Raises
    UserError if the folder lacks a part.
    """
    source = SDXL_BASE if config is None else Path(config)
    check_parts(source, OPTION)
    tokenizers = load_tokenizers(source, OPTION)
    unet = random_unet(seed=seed, config=source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL.from_config(read_json(source / "vae" / "config.json", source, OPTION))
        first = CLIPTextModel(text_config(source, "text_encoder", OPTION))
        second = CLIPTextModelWithProjection(text_config(source, "text_encoder_2", OPTION))
    for frozen in (vae, first, second):
        frozen.eval().requires_grad_(False)
    return Components(unet, vae, (first, second), tokenizers)


def random_unet(*, seed: int, config: Path | None = None, device: str | torch.device = "cpu") -> UNet2DConditionModel:
    """The UNet alone, made on `device`: 10 GB for SDXL base 1.0's config, in a second on a GPU.

    The weights are torch's own initial ones, uniform with deviation 1 / sqrt(3 fan-in): every residual branch adds less
    than it is given, so outputs are of order one and losses finite however deep the config is. The values of one seed
    differ between kinds of device, whose generators differ. Raises UserError if the config cannot be read.
    """
    source = SDXL_BASE if config is None else Path(config)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(read_json(source / "unet" / "config.json", source, OPTION))
    return unet.eval()
