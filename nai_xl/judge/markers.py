"""What a finished model says of how it was trained, read from its small files and headers; no weight is read.

A run directory says it in config.yaml, a diffusers folder in scheduler_config.json, a single file by the empty tensors
v_pred and ztsnr, which ComfyUI reads, and by the metadata modelspec.prediction_type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import safe_open

from nai_xl import config
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import TableSchedule, cosine, scaled_linear, ztsnr
from nai_xl.errors import UserError, one_line
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.model.sdxl import check_sdxl
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.record.run_dir import RunDirectory
from nai_xl.sample.config import read_config

PREDICTS: Mapping[str, Parameterization] = {p.prediction_type: p for p in (V(), Epsilon(), Sample())}
MODELSPEC = {"v": "v_prediction", "epsilon": "epsilon"}
LATENT_CHANNELS, LEVELS, SDXL_EDGE = 4, 4, 128
OPEN = "is silent on its schedule: zero terminal SNR or not"


@dataclass(frozen=True)
class Markers:
    """What a model says of itself, and where. None: nothing, or nothing clear; `unclear` tells why.

    curve: its schedule if it does not end at zero SNR, where it leaves that open.
    """

    where: str
    weights: Path  # what load_sdxl reads
    edge: int  # pixels of the canvas that it is made for
    parameterization: Parameterization | None = None
    schedule: Schedule | None = None
    curve: Schedule | None = None
    unclear: Mapping[str, str] = field(default_factory=dict)
    run: DictConfig | None = None  # the config of a run directory


def read_markers(path: Path, configs: Path | None) -> Markers:
    """`configs`: a folder of configs for a single file that is not of SDXL's sizes.

    Raises UserError for what is no finished SDXL model of 4 latent channels.
    """
    if (path / "config.yaml").is_file():
        return _of_run(path)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path}: neither a run directory (config.yaml) nor a diffusers folder (model_index.json)")
    check_sdxl(path, configs)
    return _of_folder(path) if path.is_dir() else _of_file(path, configs or SDXL_BASE)


def _of_run(path: Path) -> Markers:
    cfg = read_config(path)
    pipeline = RunDirectory(path).pipeline
    if not pipeline.is_dir():
        raise UserError(f"{path} holds no pipeline yet; a run writes it when it is finished: train it to its end")
    if not (pipeline / "unet").is_dir():
        raise UserError(f"{pipeline} holds no network that paints; give a run of task=text_to_image")
    check_sdxl(pipeline)
    _latent_edge(pipeline)
    build = partial(config.build, plugins=tuple(cfg.plugins))
    edge = int(cfg.native.resolution)
    return Markers("config.yaml", pipeline, edge, build(cfg.parameterization), build(cfg.schedule), run=cfg)


def _of_folder(path: Path) -> Markers:
    file = path / "scheduler" / "scheduler_config.json"
    said = _json(file) if file.is_file() else {}
    predicts = PREDICTS.get(str(said.get("prediction_type")))
    unclear = {} if predicts else {"parameterization": "has no prediction_type that is known here"}
    found = partial(Markers, "scheduler_config.json", path, _latent_edge(path), predicts)
    curve = CURVES.get(str(said.get("beta_schedule")), _unknown)(said) if said else None
    if said.get("trained_betas"):
        curve = _by_betas(torch.tensor(said["trained_betas"], dtype=torch.float64))
    if curve is None:
        return found(unclear=unclear | {"schedule": f"has no schedule that is known here ({file.name})"})
    if curve.zero_terminal or said.get("rescale_betas_zero_snr"):
        return found(schedule=curve if curve.zero_terminal else ztsnr(curve), unclear=unclear)
    if said.get("rescale_betas_zero_snr") is None:
        return found(curve=curve, unclear=unclear | {"schedule": f"{OPEN} (no rescale_betas_zero_snr)"})
    return found(schedule=curve, unclear=unclear)


def _of_file(path: Path, configs: Path) -> Markers:
    with safe_open(path, framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata() or {}
    v_pred, zero = "v_pred" in keys, "ztsnr" in keys
    spec = MODELSPEC.get(metadata.get("modelspec.prediction_type", ""))
    found = partial(Markers, "keys and metadata", path, _latent_edge(configs), curve=scaled_linear())
    unclear = {}
    if v_pred and spec == "epsilon":
        unclear["parameterization"] = "contradicts itself: key v_pred, but modelspec.prediction_type=epsilon"
    elif not v_pred and spec is None:
        unclear["parameterization"] = "is silent on what it predicts (no v_pred, no modelspec.prediction_type)"
    if not zero and not v_pred:
        unclear["schedule"] = f"{OPEN} (no key ztsnr)"
    predicts = PREDICTS["v_prediction" if v_pred else spec or ""] if not unclear.get("parameterization") else None
    # a file with the key v_pred follows the keys' convention, in which no ztsnr means no zero terminal SNR
    schedule = ztsnr(scaled_linear()) if zero else scaled_linear() if v_pred else None
    return found(parameterization=predicts, schedule=schedule, unclear=unclear)


# --- schedules of diffusers -------------------------------------------------------------------------------------------


def _by_betas(betas: torch.Tensor) -> Schedule:
    return TableSchedule((1 - betas).cumprod(0), {"trained_betas": tuple(betas.tolist())})


def _unknown(said: Mapping[str, Any]) -> None:
    return None


def _linear(said: Mapping[str, Any]) -> Schedule:
    return _by_betas(
        torch.linspace(said.get("beta_start", 1e-4), said.get("beta_end", 0.02), _steps(said), dtype=torch.float64)
    )


def _scaled_linear(said: Mapping[str, Any]) -> Schedule:
    return scaled_linear(
        **{key: said[key] for key in ("beta_start", "beta_end") if key in said}, timesteps=_steps(said)
    )


def _cosine(said: Mapping[str, Any]) -> Schedule:
    return cosine(timesteps=_steps(said))


def _steps(said: Mapping[str, Any]) -> int:
    return int(said.get("num_train_timesteps", 1000))


CURVES: Mapping[str, Callable[[Mapping[str, Any]], Schedule | None]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({one_line(error)}); mend it, or give the model as a single file"
        ) from error


def _latent_edge(folder: Path) -> int:
    """The edge in pixels of the canvas that the UNet is made for. Raises UserError for other latents than SDXL's."""
    unet, vae = (_json(folder / part / "config.json") for part in ("unet", "vae"))
    channels = {unet.get("in_channels"), unet.get("out_channels"), vae.get("latent_channels")}
    if channels != {LATENT_CHANNELS}:
        other = max(channels - {LATENT_CHANNELS}, key=str)
        raise UserError(f"{folder}: has latents of {other} channels; give a model of {LATENT_CHANNELS}, as SDXL has")
    if len(vae.get("block_out_channels", ())) != LEVELS:
        raise UserError(f"{folder}: its autoencoder does not divide the edge by 8; give a model of SDXL's build")
    return int(unet.get("sample_size") or SDXL_EDGE) * 8
