"""model=tiny: every part of SDXL at small width, so that the whole method runs on a laptop's CPU.

The autoencoder is trained (experiments/tiny_model). The two text encoders are random and frozen: with well
separated word vectors a random causal transformer tells captions apart, which is all that the conditioning needs here.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nai_xl.interfaces import declare
from nai_xl.model.sdxl.components import Components

ASSETS = files("nai_xl") / "assets"
TEXT_SEED = 1234  # the encoders are part of the model, as published weights are: not of the run's seed
WIDTHS = (64, 96)  # of the two text encoders

UNET_CONFIG = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 6),  # diffusers' name for the number of heads
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "cross_attention_dim": sum(WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": WIDTHS[1] + 6 * 32,
}


def tiny_unet_skeleton() -> UNet2DConditionModel:
    """The tiny UNet on the meta device: shapes without storage."""
    with torch.device("meta"):
        return UNet2DConditionModel(**UNET_CONFIG)


def tiny_text_parameters() -> int:
    """Parameters of both text encoders."""
    encoders = _text_encoders(_tokenizer("<|endoftext|>"))
    return sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())


@declare(skeleton=tiny_unet_skeleton, text_parameters=tiny_text_parameters)
def tiny_sdxl(*, seed: int) -> Components:
    """A tiny SDXL whose UNet starts random from `seed`; everything else is the same for every seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**UNET_CONFIG)
    tokenizers = (_tokenizer("<|endoftext|>"), _tokenizer("!"))
    return Components(unet=unet, vae=_vae(), text_encoders=_text_encoders(tokenizers[0]), tokenizers=tokenizers)


def vae_config() -> dict[str, Any]:
    """The autoencoder's architecture, and the scaling factor of its latents."""
    return json.loads((ASSETS / "tiny_vae.json").read_text())


def _vae() -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKL(**vae_config())
    weights = load((ASSETS / "tiny_vae.safetensors").read_bytes())
    vae.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return vae.eval().requires_grad_(False)


def _tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a small vocabulary: common words are one token, the rest are bytes."""
    lines = (ASSETS / "tiny_merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    symbols = byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of the byte-level alphabet (GPT-2's table), '!' first as in CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]


def _text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TEXT_SEED)
        first = CLIPTextModel(_text_config(WIDTHS[0], tokenizer, "quick_gelu"))
        second = CLIPTextModelWithProjection(_text_config(WIDTHS[1], tokenizer, "gelu"))
        for encoder in (first, second):
            _spread_words(encoder)
    return first, second


def _text_config(width: int, tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=WIDTHS[1],
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _spread_words(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Unit-variance word vectors, as trained encoders have. CLIP's initial 0.02 would leave all captions alike."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            torch.nn.init.normal_(parameter, std=1.0)
        elif name.endswith("position_embedding.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    encoder.eval().requires_grad_(False)
