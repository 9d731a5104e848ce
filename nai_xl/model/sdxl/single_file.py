"""Reading one .safetensors file in SDXL's original layout, as ComfyUI and others have it.

The file carries no configs and no tokenizers: those come from a config folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.configs import check_parts, text_config
from nai_xl.model.sdxl.files import open_header, read_json, refusal

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
"""The prefixes of the four models inside a single file."""

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_PROBES = {
    "UNet": UNET + "input_blocks.0.0.weight",
    "UNet's size embedding": UNET + "label_emb.0.0.weight",
    "VAE": VAE + "decoder.conv_in.weight",
    "first text encoder": CLIP_L + "text_model.embeddings.token_embedding.weight",
    "second text encoder": CLIP_G + "token_embedding.weight",
}


def check_single_file(path: Path, config: Path) -> None:
    """Raise UserError unless header and configs are of one complete SDXL model."""
    _check_file_name(path)
    check_parts(config, "model.config")
    shapes = open_header(path, path)
    missing = [part for part, key in _PROBES.items() if key not in shapes]
    if missing:
        raise refusal(path, f"{_looks_like(shapes)}, not a complete SDXL checkpoint (no {', '.join(missing)})")
    for part, (found, expected) in _sizes(shapes, config).items():
        if found != expected:
            hint = " (an inpainting model)" if part == "UNet's input channels" and found == 9 else ""
            raise refusal(
                path,
                f"{part}: {found} in the file, {expected} in {config}{hint}; for a model of other sizes than "
                "SDXL base set model.config to a folder with its configs and tokenizers",
            )


def _check_file_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise refusal(path, f"{path.suffix} files are pickles and are not read; convert it to .safetensors first")
    if path.suffix.lower() != ".safetensors":
        raise refusal(path, "not a .safetensors file")


def _looks_like(names: Mapping[str, object]) -> str:
    """What a file without all of SDXL's keys seems to be."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if any("lora_" in name or ".lora" in name or ".hada_" in name for name in names):
        return "looks like a LoRA"
    if has("conditioner.embedders.0.model."):
        return "looks like the SDXL refiner"
    if has("cond_stage_model.model."):
        return "looks like Stable Diffusion 2.x"
    if has("cond_stage_model."):
        return "looks like Stable Diffusion 1.x"
    if has("down_blocks.", "input_blocks.") or (has(UNET) and not has(VAE, "conditioner.")):
        return "looks like a UNet alone"
    if has("encoder.", "decoder.") or (has(VAE) and not has(UNET, "conditioner.")):
        return "looks like a VAE alone"
    return "looks like an incomplete SDXL checkpoint" if has(UNET) else "looks like another model"


def _sizes(shapes: Mapping[str, tuple[int, ...]], config: Path) -> dict[str, tuple[int, int]]:
    """The sizes that tell one SDXL from another, as (in the file, in the config)."""
    unet = read_json(config / "unet" / "config.json", config, "model.config")
    stem, label = shapes[_PROBES["UNet"]], shapes[_PROBES["UNet's size embedding"]]
    sizes = {
        "UNet's input channels": (stem[1], unet["in_channels"]),
        "UNet's width": (stem[0], unet["block_out_channels"][0]),
        "UNet's size embedding": (label[1], unet["projection_class_embeddings_input_dim"]),
    }
    for part, probe in (("text_encoder", "first text encoder"), ("text_encoder_2", "second text encoder")):
        vocabulary, width = shapes[_PROBES[probe]]
        encoder = text_config(config, part, "model.config")
        sizes[f"{probe}'s vocabulary"] = (vocabulary, encoder.vocab_size)
        sizes[f"{probe}'s width"] = (width, encoder.hidden_size)
    return sizes


def load_single_file(path: Path, config: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Components:
    """The model in the file, by the configs in folder `config`. Raises UserError where they do not fit each other."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(read_json(config / "unet" / "config.json", config, "model.config"))
        vae = AutoencoderKL.from_config(read_json(config / "vae" / "config.json", config, "model.config"))
        first = CLIPTextModel(text_config(config, "text_encoder", "model.config"))
        second = CLIPTextModelWithProjection(text_config(config, "text_encoder_2", "model.config"))
    _fill(unet, convert_ldm_unet_checkpoint(_read(path, UNET), unet.config), path, "UNet")
    _fill(vae, convert_ldm_vae_checkpoint(_read(path, VAE), vae.config), path, "VAE")
    clip_l = convert_ldm_clip_checkpoint(_read(path, CLIP_L))
    if not hasattr(first, "text_model"):  # transformers 5.6 dropped this level from CLIPTextModel
        clip_l = {name.removeprefix("text_model."): tensor for name, tensor in clip_l.items()}
    _fill(first, clip_l, path, "first text encoder")
    clip_g = convert_open_clip_checkpoint(second, _read(path, CLIP_G), prefix=CLIP_G)
    _fill(second, clip_g, path, "second text encoder")
    return Components(unet, vae, (first, second), tokenizers)


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a single file under one prefix, as float32, with their full names."""
    with safe_open(path, framework="pt") as file:
        # Many files carry the integer position_ids of older transformers, which are no weights.
        names = [n for n in file.keys() if n.startswith(prefix) and not n.endswith("position_ids")]  # noqa: SIM118
        # Copied, since a mapped weight would change with its file.
        return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path, part: str) -> None:
    """Give a model without storage its weights; UserError unless names and shapes are just the model's."""
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not in the config" for name in weights if name not in expected]
    wrong += [
        f"{name} is {list(weights[name].shape)}, by the config {list(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise refusal(path, f"the {part} does not fit its config, see model.config ({len(wrong)} tensors; {wrong[0]})")
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()
