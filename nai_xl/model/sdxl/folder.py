"""Reading a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.configs import STEMS, check_parts
from nai_xl.model.sdxl.files import open_header, read_json, refusal

_PIPELINES = {
    "StableDiffusionPipeline": "Stable Diffusion 1.x or 2.x",
    "StableDiffusionXLImg2ImgPipeline": "the SDXL refiner",
    "StableDiffusionXLInpaintPipeline": "an SDXL inpainting model",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
}


def check_folder(folder: Path) -> None:
    """Raise UserError unless configs and the headers of weights are of a complete SDXL model."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise refusal(folder, "has no model_index.json; give the top folder of a diffusers pipeline")
    name = read_json(index, folder, "model.path").get("_class_name")
    if name != "StableDiffusionXLPipeline":
        what = f" ({_PIPELINES[name]})" if name in _PIPELINES else ""
        raise refusal(folder, f"a {name}{what}; only SDXL base models (StableDiffusionXLPipeline) can be trained")
    check_parts(folder, "model.path")
    for part in STEMS:
        for file in _weight_files(folder, part):
            open_header(file, folder)


def load_folder(folder: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Components:
    """The model in the folder, as float32. Raises UserError for weights that are missing or do not fit."""
    return Components(
        unet=_pretrained(UNet2DConditionModel, folder, "unet"),
        vae=_pretrained(AutoencoderKL, folder, "vae"),
        text_encoders=(
            _pretrained(CLIPTextModel, folder, "text_encoder"),
            _pretrained(CLIPTextModelWithProjection, folder, "text_encoder_2"),
        ),
        tokenizers=tokenizers,
    )


def _pretrained(kind: Any, folder: Path, part: str) -> Any:
    """One model of a diffusers folder; UserError if weights are missing, which the libraries would fill at random."""
    dtype = {"torch_dtype" if kind in (UNet2DConditionModel, AutoencoderKL) else "dtype": torch.float32}
    try:
        model, report = kind.from_pretrained(
            folder,
            subfolder=part,
            variant=_variant(folder, part),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise refusal(folder, f"{part}/ cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise refusal(folder, f"{part}/ lacks {len(missing)} of its tensors, the first being {missing[0]}")
    for parameter in model.parameters():
        # Float32 weights come mapped to their file: a copy keeps the model as it is when the file is overwritten.
        parameter.data = parameter.data.clone()
    return model.eval()


def _variant(folder: Path, part: str) -> str | None:
    """The variant to ask from_pretrained for: None for plain weights, fp16 where the folder has no others."""
    stem = STEMS[part]
    for variant, names in {
        None: (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        "fp16": (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    }.items():
        if any((folder / part / name).is_file() for name in names):
            return variant
    if any((folder / part).glob("*.bin")):
        raise refusal(folder, f"{part}/ has only pickled weights (.bin), which are not read; save it as safetensors")
    raise refusal(folder, f"{part}/ has no weights ({stem}.safetensors)")


def _weight_files(folder: Path, part: str) -> list[Path]:
    variant, stem = _variant(folder, part), STEMS[part]
    suffix = "" if variant is None else f".{variant}"
    single = folder / part / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return [single]
    index = read_json(folder / part / f"{stem}.safetensors.index{suffix}.json", folder, "model.path")
    return [folder / part / name for name in sorted(set(index.get("weight_map", {}).values()))]
