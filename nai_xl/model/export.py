"""The trained model for other programs: a folder that plain diffusers loads and samples from, or a single file."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from nai_xl.errors import UserError
from nai_xl.files import replace_folder
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.single_file import to_single_file
from nai_xl.model.vae import folded
from nai_xl.record.run_dir import RunDirectory

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def scheduler(schedule: Schedule, parameterization: Parameterization) -> EulerDiscreteScheduler:
    """SDXL's own Euler, which is DDIM in another notation and takes any number of steps. At zero terminal SNR it begins
    at sigma 4096 in place of infinity. diffusers' DDIM would step off the trailing grid whenever the number of steps
    does not divide that of timesteps, as 28 and 1000.
    """
    return EulerDiscreteScheduler(**schedule.scheduler_config(), prediction_type=parameterization.prediction_type)


def save_pipeline(
    components: Components,
    weights: Mapping[str, Tensor],
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    mean: Tensor,
    std: Tensor,
    resolution: int,
    path: Path,
) -> Path:
    """Write a StableDiffusionXLPipeline with `weights` in the UNet, which was trained on (raw latent - mean) / std.

    `weights` holds every parameter and every persistent buffer of the UNet, by name. Raises ValueError if it does not:
    a UNet that is written in part trained looks like any other.

    Not every reader knows of a normalisation by channel, so that one is folded into the autoencoder that is written.
    mean, std [4,1,1]. `resolution` is the edge in pixels of the canvas that a reader paints when it is asked for none.
    An existing folder is replaced as a whole.
    """
    _load_all(components.unet, weights)
    components.unet.register_to_config(sample_size=resolution // 8)
    pipeline = StableDiffusionXLPipeline(
        vae=folded(components.vae, mean, std),
        text_encoder=components.text_encoders[0],
        text_encoder_2=components.text_encoders[1],
        tokenizer=components.tokenizers[0],
        tokenizer_2=components.tokenizers[1],
        unet=components.unet,
        scheduler=scheduler(schedule, parameterization),
        # the unconditional side was trained with the encoded empty caption, not with zeros
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return replace_folder(path, lambda aside: pipeline.save_pretrained(aside, safe_serialization=True))


def _load_all(unet: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the UNet these weights, on the CPU and in their own precision. Raises ValueError for other names."""
    expected = unet.state_dict().keys()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is none of the UNet's" for name in weights if name not in expected]
    if wrong:
        raise ValueError(f"the weights are not those of the UNet ({len(wrong)} names differ; {wrong[0]})")
    # a UNet that was trained in bfloat16 would round its float32 averages; on the CPU, where there is room for that
    unet.to("cpu", functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()}))
    unet.load_state_dict(dict(weights))


def export(run: Path, file: Path, dtype: str) -> Path:
    """Write the pipeline of a run directory, or a diffusers folder, into the single file `file`.

    dtype: one of DTYPES. Raises UserError when there is no pipeline yet, and where `file` cannot be written.
    """
    pipeline = RunDirectory(run).pipeline if RunDirectory(run).pipeline.is_dir() else run
    settings = pipeline / "scheduler" / "scheduler_config.json"
    if (pipeline / "vae").is_dir() and not (pipeline / "unet").is_dir():
        raise UserError(f"{run} has trained an autoencoder ({pipeline / 'vae'}), which a single file cannot hold alone")
    if not settings.is_file():
        raise UserError(f"{run} holds no pipeline; a run writes it when it is finished")
    scheduled = json.loads(settings.read_text())
    if scheduled["prediction_type"] not in ("v_prediction", "epsilon"):
        raise UserError(f"a single file cannot say that its model predicts the {scheduled['prediction_type']}")
    try:
        return to_single_file(
            load_sdxl(pipeline),
            file,
            v_prediction=scheduled["prediction_type"] == "v_prediction",
            zero_terminal_snr=scheduled.get("rescale_betas_zero_snr", False),
            dtype=DTYPES[dtype],
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be written ({error})") from error
