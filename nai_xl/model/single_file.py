"""Writing an SDXL model as one .safetensors file in SDXL's original layout, which ComfyUI and others read.

The names are worked out from the modules themselves, so any number of blocks and layers maps. In the original layout
the UNet's blocks are counted in one row: a down block's layers and its downsampler are each one entry of
input_blocks, a layer's ResNet being part 0 and its transformer part 1; up blocks likewise, where the upsampler is a
further part of the block's last entry.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.single_file import CLIP_G, CLIP_L, UNET, VAE

Model = Any
"""One of the models of Components. Any, since type checkers see placeholders where diffusers imports lazily."""

_UNET_PARTS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_INNER = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
}
_VAE_INNER = {
    "resnets": {"conv_shortcut": "nin_shortcut"},
    "attentions": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
}
_CLIP_G_INNER = {
    "layers": {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
}


def to_single_file(
    components: Components,
    path: Path,
    *,
    v_prediction: bool,
    zero_terminal_snr: bool,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write `components` to the .safetensors file `path`, all weights as `dtype`, and return `path`.

    ComfyUI tells v-prediction by an empty tensor `v_pred` and a zero-terminal-SNR schedule by an empty tensor
    `ztsnr`. The file appears under its name only when it is complete. Raises OSError where it cannot be written.
    """
    path = Path(path)
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in original_layout(components).items()
    }
    marks = {"v_pred": v_prediction, "ztsnr": zero_terminal_snr}
    tensors |= {name: torch.empty(0) for name, wanted in marks.items() if wanted}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=_metadata(path.stem, v_prediction))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def original_layout(components: Components) -> dict[str, Tensor]:
    """Every tensor of the model under its name in the original layout, in the dtype and on the device it is in.

    Views of the model's own tensors wherever the layout allows, so that a model on the meta device takes no memory.
    """
    clip_l, clip_g = components.text_encoders
    return {
        **_prefixed(UNET, unet_layout(components.unet)),
        **_prefixed(VAE, vae_layout(components.vae)),
        **_prefixed(CLIP_L, clip_l_layout(clip_l)),
        **_prefixed(CLIP_G, clip_g_layout(clip_g)),
    }


def unet_layout(unet: Model) -> dict[str, Tensor]:
    """The UNet's tensors by original name, without prefix."""
    places = {**_UNET_PARTS, **_down_places(unet), **_mid_places(unet), **_up_places(unet)}
    return {_translate(name, places, _UNET_INNER): tensor for name, tensor in unet.state_dict().items()}


def vae_layout(vae: Model) -> dict[str, Tensor]:
    """The VAE's tensors by original name, without prefix; its attention's linear weights become 1x1 convolutions."""
    places = _vae_places(vae)
    layout = {}
    for name, tensor in vae.state_dict().items():
        linear = ".attentions." in name and name.endswith(".weight") and tensor.dim() == 2
        layout[_translate(name, places, _VAE_INNER)] = tensor[:, :, None, None] if linear else tensor
    return layout


def clip_l_layout(encoder: Model) -> dict[str, Tensor]:
    """The first text encoder's tensors by original name, without prefix: transformers' own, under text_model."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in encoder.state_dict().items()}


def clip_g_layout(encoder: Model) -> dict[str, Tensor]:
    """The second text encoder's tensors by open_clip name, without prefix.

    open_clip keeps query, key and value as one matrix (3 x width, width), and the projection as (width, projection),
    applied from the right, where transformers' Linear has its transpose.
    """
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    layout = {
        "positional_embedding": weights.pop("embeddings.position_embedding.weight"),
        "text_projection": weights.pop("text_projection.weight").T,
    }
    places = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        places[source] = target
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{source}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            layout[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    return layout | {_translate(name, places, _CLIP_G_INNER): tensor for name, tensor in weights.items()}


def _down_places(unet: Model) -> dict[str, str]:
    places, entry = {}, 0  # entry 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            entry += 1
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{entry}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{entry}.1"
        if block.downsamplers:
            entry += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{entry}.0.op"
    return places


def _mid_places(unet: Model) -> dict[str, str]:
    """ResNet, then transformer and ResNet by turns, counted in one row."""
    places = {}
    for i in range(len(unet.mid_block.resnets)):
        places[f"mid_block.resnets.{i}"] = f"middle_block.{2 * i}"
        places[f"mid_block.attentions.{i}"] = f"middle_block.{2 * i + 1}"
    return places


def _up_places(unet: Model) -> dict[str, str]:
    places, entry = {}, -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            entry += 1
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{entry}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{entry}.1"
        if block.upsamplers:
            part = 2 if getattr(block, "attentions", None) else 1
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{entry}.{part}.conv"
    return places


def _vae_places(vae: Model) -> dict[str, str]:
    """The original decoder numbers its up blocks from the image, diffusers from the latent."""
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, blocks, kind in (("encoder", vae.encoder.down_blocks, "down"), ("decoder", vae.decoder.up_blocks, "up")):
        places |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        places[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for j in range(2):
            places[f"{half}.mid_block.resnets.{j}"] = f"{half}.mid.block_{j + 1}"
        for i, block in enumerate(blocks):
            source = f"{half}.{kind}_blocks.{i}"
            target = f"{half}.{kind}.{i if kind == 'down' else len(blocks) - 1 - i}"
            places |= {f"{source}.resnets.{j}": f"{target}.block.{j}" for j in range(len(block.resnets))}
            places[f"{source}.{kind}samplers.0.conv"] = f"{target}.{kind}sample.conv"
    return places


def _translate(name: str, places: Mapping[str, str], inner: Mapping[str, Mapping[str, str]]) -> str:
    """The original name of a tensor: its module's place, then what follows, renamed by the kind of the module.

    Raises ValueError for a module that has no place, such as one that an adapter has added.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        place, rest = places.get(".".join(parts[:cut])), ".".join(parts[cut:])
        if place is None:
            continue
        kind = parts[cut - 2] if cut > 1 else ""  # "resnets" of down_blocks.0.resnets.1
        for old, new in inner.get(kind, {}).items():
            if rest.startswith(f"{old}."):
                rest = new + rest.removeprefix(old)
                break
        return f"{place}.{rest}"
    raise ValueError(f"{name} has no place in SDXL's original layout")


def _prefixed(prefix: str, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in layout.items()}


def _metadata(title: str, v_prediction: bool) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }
