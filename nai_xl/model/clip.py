"""CLIP with both of its towers, as torchmetrics' CLIP score asks for it: model and processor out of one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from nai_xl.errors import UserError, one_line
from nai_xl.model.quiet import quietly


class Clip:
    """The model: pictures and texts to vectors of one space. transformers 5 hides these in its outputs."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> Clip:
        self.model.to(device)
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """[B,3,h,w] -> [B,D]"""
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B,L] twice -> [B,D]"""
        return self.model.get_text_features(ids, mask).pooler_output


class ClipProcessor:
    """The processor. Longer captions than the model reads lose their end, but keep the token at which CLIP looks."""

    def __init__(self, processor: Any, longest: int):
        self.processor, self.longest = processor, longest

    def __call__(self, *, text: Sequence[str] = (), images: Sequence[Tensor] = (), **_: Any) -> Any:
        if images:
            return self.processor(images=list(images), return_tensors="pt")
        cut = {"truncation": True, "max_length": self.longest}
        return self.processor(text=list(text), return_tensors="pt", padding=True, **cut)


def check_clip(folder: Path) -> None:
    """Raise ValueError unless `folder` looks like a CLIP model of transformers; reads no weight."""
    config = folder / "config.json"
    if not folder.is_dir():
        raise ValueError("no such folder; give one with a CLIP model of transformers")
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError("no CLIP model of transformers: config.json and model.safetensors are needed")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"config.json cannot be read ({one_line(error)})") from error
    if kind != "clip":
        raise ValueError(f"config.json is of a model of type {kind}, and not of CLIP with both towers")


def load_clip(folder: Path) -> tuple[Clip, ClipProcessor]:
    """Float32, on the CPU, in eval mode, and never from the network. Raises UserError for an incomplete folder."""
    given: dict[str, Any] = {"local_files_only": True}
    try:
        with quietly():
            processor = CLIPProcessor.from_pretrained(folder, **given)
            model, found = CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **given
            )
    except (ValueError, RuntimeError, OSError, TypeError, SafetensorError) as error:
        raise UserError(f"evals.quality.clip={folder}: cannot be loaded ({one_line(error)[:300]})") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"evals.quality.clip={folder}: lacks {len(missing)} tensors, the first being {missing[0]}")
    longest = model.config.text_config.max_position_embeddings
    return Clip(model.eval().requires_grad_(False)), ClipProcessor(processor, longest)
