"""Reading Stable Diffusion XL: from a diffusers folder, or from one .safetensors file in SDXL's original layout.

Weights are read from safetensors only and come back as float32. Nothing is downloaded: a single file carries no
configs and no tokenizers, so those come from a config folder, which is SDXL base 1.0's own unless another is given.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from nai_xl.errors import UserError
from nai_xl.interfaces import declare

SDXL_BASE = Path(__file__).parent.parent / "assets" / "sdxl"
"""The config folder of SDXL base 1.0: component configs, and the CLIP vocabulary for both tokenizers."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
"""The prefixes of the four models inside a single file."""

_BPE = "bpe_simple_vocab_16e6.txt.gz"
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_PIPELINES = {
    "StableDiffusionPipeline": "Stable Diffusion 1.x or 2.x",
    "StableDiffusionXLImg2ImgPipeline": "the SDXL refiner",
    "StableDiffusionXLInpaintPipeline": "an SDXL inpainting model",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
}
_PROBES = {
    "UNet": UNET + "input_blocks.0.0.weight",
    "UNet's size embedding": UNET + "label_emb.0.0.weight",
    "VAE": VAE + "decoder.conv_in.weight",
    "first text encoder": CLIP_L + "text_model.embeddings.token_embedding.weight",
    "second text encoder": CLIP_G + "token_embedding.weight",
}


@dataclass
class Components:
    """The parts of an SDXL model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]


@declare(without_effect=("config",))
def load_sdxl(path: Path, *, config: Path | None = None) -> Components:
    """Read an SDXL model as float32, on the CPU, in eval mode.

    `path` is a diffusers folder or a single .safetensors file. `config` is for a single file only: a folder laid out
    like a diffusers model (unet/config.json, ..., tokenizer/, tokenizer_2/; weights are not needed) that supplies
    configs and tokenizers, SDXL base 1.0's where it is None. A diffusers folder brings its own, and `config` is not
    read for it. Raises UserError for whatever is not a complete SDXL model.
    """
    path, source = Path(path), SDXL_BASE if config is None else Path(config)
    check_sdxl(path, config)
    with _quiet():
        if path.is_dir():
            return _from_folder(path, _load_tokenizers(path, "model.path"))
        return _from_single_file(path, source, _load_tokenizers(source, "model.config"))


def check_sdxl(path: Path, config: Path | None = None) -> None:
    """Raise UserError unless `path` looks like a complete SDXL model; reads headers and configs, never a weight."""
    path = Path(path)
    if not path.exists():
        raise _bad(path, "no such file or folder; give a diffusers folder or a .safetensors file of an SDXL model")
    if path.is_dir():
        _check_folder(path)
    else:
        source = SDXL_BASE if config is None else Path(config)
        _check_file_name(path)
        _check_parts(source, "model.config")
        _check_single_file(path, source)


def unet_skeleton(config: Path = SDXL_BASE) -> UNet2DConditionModel:
    """The UNet of a config folder on the meta device: shapes without storage. Raises UserError for no such config."""
    config = Path(config)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(_read_json(config / "unet" / "config.json", config, "model.config"))


def fingerprint(module: nn.Module) -> str:
    """16 hex characters of a SHA-256 over the names, dtypes, shapes and bytes of the state dict, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Bytes rather than values: NumPy knows no bfloat16, and a view costs no copy.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _bad(path: Path, what: str, option: str = "model.path") -> UserError:
    return UserError(f"{option}={path}: {what}")


def _read_json(path: Path, root: Path, option: str) -> dict[str, Any]:
    """A JSON object; UserError if the file is missing or is not one."""
    name = path.relative_to(root)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _bad(root, f"{name} is missing; this is not a complete SDXL model folder", option) from error
    except ValueError as error:
        raise _bad(root, f"{name} is not valid JSON ({error})", option) from error
    if not isinstance(content, dict):
        raise _bad(root, f"{name} is not a JSON object", option)
    return content


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise _bad(folder, "has no model_index.json; give the top folder of a diffusers pipeline")
    name = _read_json(index, folder, "model.path").get("_class_name")
    if name != "StableDiffusionXLPipeline":
        what = f" ({_PIPELINES[name]})" if name in _PIPELINES else ""
        raise _bad(folder, f"a {name}{what}; only SDXL base models (StableDiffusionXLPipeline) can be trained")
    _check_parts(folder, "model.path")
    for part in _STEMS:
        for file in _weight_files(folder, part):
            _open_header(file, folder)


def _check_parts(folder: Path, option: str) -> None:
    """The configs and tokenizer files that a model folder and a config folder both need."""
    if not folder.is_dir():
        raise _bad(folder, "no such folder", option)
    missing = [part for part in (*_STEMS, *_TOKENIZERS) if not (folder / part).is_dir()]
    if missing:
        raise _bad(folder, f"lacks {', '.join(f'{part}/' for part in missing)}", option)
    configs = {part: _read_json(folder / part / "config.json", folder, option) for part in _STEMS}
    embedding = configs["unet"].get("addition_embed_type")
    if embedding != "text_time":
        raise _bad(folder, f"unet/config.json has addition_embed_type {embedding!r}; SDXL's is 'text_time'", option)
    if (folder / _BPE).is_file():
        return
    for part in _TOKENIZERS:
        files = {file.name for file in (folder / part).iterdir()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            raise _bad(folder, f"{part}/ has neither tokenizer.json nor vocab.json and merges.txt", option)


def _variant(folder: Path, part: str) -> str | None:
    """The variant to ask from_pretrained for: None for plain weights, fp16 where the folder has no others."""
    stem = _STEMS[part]
    for variant, names in {
        None: (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        "fp16": (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    }.items():
        if any((folder / part / name).is_file() for name in names):
            return variant
    if any((folder / part).glob("*.bin")):
        raise _bad(folder, f"{part}/ has only pickled weights (.bin), which are not read; save it as safetensors")
    raise _bad(folder, f"{part}/ has no weights ({stem}.safetensors)")


def _weight_files(folder: Path, part: str) -> list[Path]:
    variant, stem = _variant(folder, part), _STEMS[part]
    suffix = "" if variant is None else f".{variant}"
    single = folder / part / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return [single]
    index = _read_json(folder / part / f"{stem}.safetensors.index{suffix}.json", folder, "model.path")
    return [folder / part / name for name in sorted(set(index.get("weight_map", {}).values()))]


def _open_header(file: Path, root: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the file, from its header; UserError if it is truncated or corrupt."""
    name = "" if file == root else f"{file.relative_to(root)} "
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _bad(root, f"{name}is corrupt or not completely downloaded ({error})") from error
    except OSError as error:
        raise _bad(root, f"{name}cannot be read ({error})") from error


def _check_file_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise _bad(path, f"{path.suffix} files are pickles and are not read; convert it to .safetensors first")
    if path.suffix.lower() != ".safetensors":
        raise _bad(path, "not a .safetensors file")


def _check_single_file(path: Path, config: Path) -> None:
    shapes = _open_header(path, path)
    missing = [part for part, key in _PROBES.items() if key not in shapes]
    if missing:
        raise _bad(path, f"{_looks_like(shapes)}, not a complete SDXL checkpoint (no {', '.join(missing)})")
    for part, (found, expected) in _sizes(shapes, config).items():
        if found != expected:
            hint = " (an inpainting model)" if part == "UNet's input channels" and found == 9 else ""
            raise _bad(
                path,
                f"{part}: {found} in the file, {expected} in {config}{hint}; for a model of other sizes than "
                "SDXL base set model.config to a folder with its configs and tokenizers",
            )


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
    unet = _read_json(config / "unet" / "config.json", config, "model.config")
    stem, label = shapes[_PROBES["UNet"]], shapes[_PROBES["UNet's size embedding"]]
    sizes = {
        "UNet's input channels": (stem[1], unet["in_channels"]),
        "UNet's width": (stem[0], unet["block_out_channels"][0]),
        "UNet's size embedding": (label[1], unet["projection_class_embeddings_input_dim"]),
    }
    for part, probe in (("text_encoder", "first text encoder"), ("text_encoder_2", "second text encoder")):
        vocabulary, width = shapes[_PROBES[probe]]
        encoder = _text_config(config, part, "model.config")
        sizes[f"{probe}'s vocabulary"] = (vocabulary, encoder.vocab_size)
        sizes[f"{probe}'s width"] = (width, encoder.hidden_size)
    return sizes


def _text_config(folder: Path, part: str, option: str) -> CLIPTextConfig:
    """Through the class rather than from the JSON, since transformers leaves settings at their default out of it."""
    return CLIPTextConfig.from_dict(_read_json(folder / part / "config.json", folder, option))


def _load_tokenizers(folder: Path, option: str) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    first, second = (_load_tokenizer(folder, part, option) for part in _TOKENIZERS)
    return first, second


def _load_tokenizer(folder: Path, part: str, option: str) -> CLIPTokenizer:
    """One tokenizer, from its own files or the folder's CLIP vocabulary; UserError if its ids exceed the embedding."""
    if (folder / _BPE).is_file():
        settings = _read_json(folder / part / "tokenizer_config.json", folder, option)
        del settings["tokenizer_class"]
        vocabulary, merges = _clip_vocabulary(folder / _BPE)
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, **settings)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(folder / part, local_files_only=True)
    encoder = part.replace("tokenizer", "text_encoder")
    rows = _text_config(folder, encoder, option).vocab_size
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise _bad(folder, f"{part}/ has {needed} tokens, but {encoder}/ has embeddings for only {rows}", option)
    if tokenizer.pad_token != tokenizer.eos_token:
        # The second tokenizer pads with "!", an ordinary character: read as a special token, each "!" of a caption
        # would become padding (id 0), where open_clip, which the encoder was trained with, gives "!</w>" (id 256).
        tokenizer.split_special_tokens = True
    return tokenizer


def _clip_vocabulary(path: Path) -> tuple[dict[str, int], Any]:
    """CLIP's 49,408 tokens with their ids, and its 48,894 merges, pairs of tokens, in order of priority."""
    with gzip.open(path, mode="rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    # Each byte is written as one printable character: itself where it has one, else the next one from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and only errors from the libraries: what matters is checked here and raised as UserError."""
    restore: list[Any] = []
    for logging in (diffusers_logging, transformers_logging):
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        restore.append((logging, level, bars))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, level, bars in restore:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _from_folder(folder: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Components:
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
        raise _bad(folder, f"{part}/ cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise _bad(folder, f"{part}/ lacks {len(missing)} of its tensors, the first being {missing[0]}")
    for parameter in model.parameters():
        # Float32 weights come mapped to their file: without a copy, whoever overwrites that changes the model.
        parameter.data = parameter.data.clone()
    return model.eval()


def _from_single_file(path: Path, config: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Components:
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(_read_json(config / "unet" / "config.json", config, "model.config"))
        vae = AutoencoderKL.from_config(_read_json(config / "vae" / "config.json", config, "model.config"))
        first = CLIPTextModel(_text_config(config, "text_encoder", "model.config"))
        second = CLIPTextModelWithProjection(_text_config(config, "text_encoder_2", "model.config"))
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
        # Copied, so that they are not mapped to the file, as in _pretrained.
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
        raise _bad(path, f"the {part} does not fit its config, see model.config ({len(wrong)} tensors; {wrong[0]})")
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()
