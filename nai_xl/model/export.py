"""The trained model as a folder that plain diffusers loads and samples from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.model.sdxl import Components
from nai_xl.model.vae import folded


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

    Not every reader knows of a normalisation by channel, so that one is folded into the autoencoder that is written.
    mean, std [4,1,1]. `resolution` is the edge in pixels of the canvas that a reader paints when it is asked for none.
    An existing folder is replaced as a whole.
    """
    components.unet.register_to_config(sample_size=resolution // 8)
    # a UNet that was trained in bfloat16 would round its float32 average; on the CPU, where there is room for that
    components.unet.to("cpu", next((weight.dtype for weight in weights.values()), components.unet.dtype))
    components.unet.load_state_dict(dict(weights), strict=False)
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
    aside = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside, safe_serialization=True)
    shutil.rmtree(path, ignore_errors=True)
    return aside.rename(path)
