"""What all trainers of peers.py are given: one model with random weights, and images with captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nai_xl.diffusion.parameterization import Epsilon
from nai_xl.diffusion.schedule import scaled_linear
from nai_xl.model.export import save_pipeline
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.sdxl_random import sdxl_random

# where sd-scripts looks for tokenizers before it asks the hub
HUB_TOKENIZERS = {
    "openai_clip-vit-large-patch14": "tokenizer",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "tokenizer_2",
}
# SDXL's build with small numbers. sd-scripts groups channels by 32, embeds each size by 256 numbers and reads the first
# text encoder's 11th layer, so these stay.
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 160,
        "projection_class_embeddings_input_dim": 96 + 6 * 256,
        "sample_size": 16,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 128},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "projection_dim": 64},
    "text_encoder_2": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "projection_dim": 96,
    },
}
WORDS = "red blue green old small bright stone river house tree cloud bird street window mountain lamp".split()


def write_model(size: str, folder: Path) -> None:
    """A diffusers folder of SDXL, full-size or tiny, with weights drawn from a seed, by the package's own writer.

    Beside it a folder "tokenizers" for sd-scripts.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    components = sdxl_random(seed=0, config=None if size == "sdxl" else tiny_config(folder.parent / "config"))
    factor = components.vae.config.scaling_factor
    mean, std = torch.zeros(4, 1, 1), torch.full((4, 1, 1), 1 / factor)
    weights = components.unet.state_dict()
    edge = components.unet.config.sample_size * 8
    save_pipeline(components, weights, scaled_linear(), Epsilon(), mean=mean, std=std, resolution=edge, path=folder)
    for name, part in HUB_TOKENIZERS.items():
        shutil.copytree(folder / part, folder.parent / "tokenizers" / name, dirs_exist_ok=True)


def tiny_config(folder: Path) -> Path:
    shutil.copytree(SDXL_BASE, folder, dirs_exist_ok=True)
    for part, smaller in TINY.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | smaller), encoding="utf-8")
    return folder


def write_images(folder: Path, count: int, edge: int) -> None:
    """`count` square PNGs of smooth random colours and noise; captions beside them and as diffusers' metadata.jsonl."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((edge, edge), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + draw.integers(-24, 25, (edge, edge, 3))).clip(0, 255).astype(np.uint8)
        caption = " ".join(draw.choice(WORDS, 12))
        Image.fromarray(noisy).save(folder / f"{number:05}.png", compress_level=1)
        (folder / f"{number:05}.txt").write_text(caption, encoding="utf-8")
        lines.append(json.dumps({"file_name": f"{number:05}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
