"""The configs of an SDXL model: a folder of them, laid out like a diffusers model whose weights are not needed."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nai_xl.model.sdxl.files import read_json, refusal

SDXL_BASE = Path(__file__).parents[2] / "assets" / "sdxl"
"""The config folder of SDXL base 1.0: component configs, and the CLIP vocabulary for both tokenizers."""

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
"""CLIP's own, which a config folder can hold in place of each tokenizer's files."""

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Part -> the name of its weight files, without suffix."""

TOKENIZERS = ("tokenizer", "tokenizer_2")


def check_parts(folder: Path, option: str) -> None:
    """Raise UserError unless `folder` has the configs and tokenizers that a model folder and a config folder need.

    option: the config key that names the folder, for the message.
    """
    if not folder.is_dir():
        raise refusal(folder, "no such folder", option)
    missing = [part for part in (*STEMS, *TOKENIZERS) if not (folder / part).is_dir()]
    if missing:
        raise refusal(folder, f"lacks {', '.join(f'{part}/' for part in missing)}", option)
    configs = {part: read_json(folder / part / "config.json", folder, option) for part in STEMS}
    embedding = configs["unet"].get("addition_embed_type")
    if embedding != "text_time":
        raise refusal(folder, f"unet/config.json has addition_embed_type {embedding!r}; SDXL's is 'text_time'", option)
    if (folder / VOCABULARY).is_file():
        return
    for part in TOKENIZERS:
        files = {file.name for file in (folder / part).iterdir()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            raise refusal(folder, f"{part}/ has neither tokenizer.json nor vocab.json and merges.txt", option)


def text_config(folder: Path, part: str, option: str) -> CLIPTextConfig:
    """The config of a text encoder, with the defaults that transformers leaves out of the JSON."""
    return CLIPTextConfig.from_dict(read_json(folder / part / "config.json", folder, option))


def text_parameters(config: Path = SDXL_BASE) -> int:
    """How many parameters both text encoders of a config folder have. Raises UserError for no such config."""
    first, second = (text_config(Path(config), part, "model.config") for part in ("text_encoder", "text_encoder_2"))
    with torch.device("meta"):
        encoders = (CLIPTextModel(first), CLIPTextModelWithProjection(second))
    return sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())


def unet_skeleton(config: Path = SDXL_BASE) -> UNet2DConditionModel:
    """The UNet of a config folder on the meta device: shapes without storage. Raises UserError for no such config."""
    config = Path(config)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(read_json(config / "unet" / "config.json", config, "model.config"))
