"""The painter of a finished run: its averaged weights, sampled exactly as they were trained."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nai_xl import config
from nai_xl.diffusion.sampling import Sampling
from nai_xl.errors import UserError, one_line
from nai_xl.evals.painter import Painter
from nai_xl.interfaces import Denoiser, Precision
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.text import encode_texts
from nai_xl.model.vae import decode_latents
from nai_xl.record.run_dir import RunDirectory

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def painter(run: Path, cfg: DictConfig, device: torch.device, **settings: Any) -> Painter:
    """A painter with the averaged weights of the run's pipeline.

    `cfg` is the run's config. `settings` are fields of Sampling; those that are not None replace the run's own. Raises
    UserError when there is no pipeline yet, and for settings that cannot be.
    """
    build = functools.partial(config.build, plugins=tuple(cfg.plugins))
    own: Sampling = build(cfg.sampling)
    schedule = build(cfg.schedule)
    try:
        sampling = replace(own, **{name: value for name, value in settings.items() if value is not None})
        schedule.inference_timesteps(sampling.steps)  # refuses more steps than there are before any weight is read
    except ValueError as error:  # it begins with the setting's name, which is the option's too
        raise UserError(f"--{one_line(error)}") from error
    pipeline = RunDirectory(run).pipeline
    if not pipeline.is_dir():
        raise UserError(f"{run} holds no pipeline yet; a run writes it when it is finished")
    if not (pipeline / "unet").is_dir():
        raise UserError(f"{pipeline} holds no network that paints; give a run of task=text_to_image")
    parts = load_sdxl(pipeline)
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.to(device)
    chunks = build(cfg.text).chunks

    def condition(text: str) -> tuple[Tensor, Tensor]:
        context, pooled = encode_texts(parts.tokenizers, parts.text_encoders, [text], chunks=chunks)
        return context[0], pooled[0]

    return Painter(
        denoise=as_trained(parts, build(cfg.precision).autocast, device),
        schedule=schedule,
        parameterization=build(cfg.parameterization),
        sampling=sampling,
        condition=condition,
        decode=lambda latents: decode_latents(parts.vae, latents / parts.vae.config.scaling_factor),
        device=device,
    )


def as_trained(parts: Components, mixed_precision: Precision, device: torch.device) -> Denoiser:
    """The UNet, called in this precision."""
    dtype = AUTOCAST.get(mixed_precision)
    return torch.autocast(device.type, dtype)(parts.unet.forward) if dtype else parts.unet
