"""Stable Diffusion XL: read from a diffusers folder, or from one .safetensors file in SDXL's original layout.

Weights are read from safetensors only and come back as float32. Nothing is downloaded: a single file carries no
configs and no tokenizers, so those come from a config folder, which is SDXL base 1.0's own unless another is given.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from nai_xl.interfaces import declare
from nai_xl.model.quiet import quietly
from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.configs import SDXL_BASE, text_parameters, unet_skeleton
from nai_xl.model.sdxl.files import refusal
from nai_xl.model.sdxl.folder import check_folder, load_folder
from nai_xl.model.sdxl.single_file import check_single_file, load_single_file
from nai_xl.model.sdxl.tokenizers import load_tokenizers


def check_sdxl(path: Path, config: Path | None = None) -> None:
    """Raise UserError unless `path` looks like a complete SDXL model; reads headers and configs, never a weight."""
    path = Path(path)
    if not path.exists():
        raise refusal(path, "no such file or folder; give a diffusers folder or a .safetensors file of an SDXL model")
    if path.is_dir():
        check_folder(path)
    else:
        check_single_file(path, SDXL_BASE if config is None else Path(config))


def sdxl_skeleton(path: Path | None = None, config: Path | None = None) -> UNet2DConditionModel:
    """The UNet that load_sdxl would read, without storage. `path` need not be there: only a folder brings a config."""
    own = path if path and Path(path, "unet").is_dir() else None
    return unet_skeleton(own or config or SDXL_BASE)


def sdxl_text_parameters(path: Path | None = None, config: Path | None = None) -> int:
    """Parameters of both text encoders, of the configs that sdxl_skeleton takes."""
    own = path if path and Path(path, "text_encoder").is_dir() else None
    return text_parameters(own or config or SDXL_BASE)


@declare(without_effect=("config",), check=check_sdxl, skeleton=sdxl_skeleton, text_parameters=sdxl_text_parameters)
def load_sdxl(path: Path, *, config: Path | None = None) -> Components:
    """Read an SDXL model as float32, on the CPU, in eval mode.

    `path` is a diffusers folder or a single .safetensors file. `config` is for a single file only: a folder laid out
    like a diffusers model (unet/config.json, ..., tokenizer/, tokenizer_2/; weights are not needed) that supplies
    configs and tokenizers, SDXL base 1.0's where it is None. A diffusers folder brings its own, and `config` is not
    read for it. Raises UserError for whatever is not a complete SDXL model.
    """
    path, source = Path(path), SDXL_BASE if config is None else Path(config)
    check_sdxl(path, config)
    with quietly():
        if path.is_dir():
            return load_folder(path, load_tokenizers(path, "model.path"))
        return load_single_file(path, source, load_tokenizers(source, "model.config"))
