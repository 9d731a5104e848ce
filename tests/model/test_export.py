"""The exported pipeline, in plain diffusers, paints what our own sampler paints."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import safe_open

from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.sampling import Sampling, sample_latents
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.model.export import export, save_pipeline
from nai_xl.model.latents import ScaleLatents, Statistics, moments
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.text import encode_texts
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.model.vae import decode_latents, encode_pixels

PROMPT = "a tall white rocket at night"
unmeasured = functools.partial(moments, ())


def conditions(parts: Components, text: str, height: int, width: int) -> dict[str, torch.Tensor]:
    context, pooled = encode_texts(parts.tokenizers, parts.text_encoders, [text], chunks=1)
    size = [float(height), float(width)]
    return {"context": context, "pooled": pooled, "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]])}


def difference(
    parts: Components,
    schedule: Schedule,
    p: Parameterization,
    steps: int,
    statistics: Statistics,
    pipeline: StableDiffusionXLPipeline,
) -> int:
    """The largest difference, in 255ths, of any pixel between our sampler's picture and the pipeline's."""
    mean, std = statistics
    height, width = 96, 160
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(
        parts.unet, noise, schedule, p,
        condition=conditions(parts, PROMPT, height, width),
        unconditional=conditions(parts, "", height, width),
        sampling=Sampling(steps=steps, guidance=5.0, rescale=0.7),
    )  # fmt: skip
    ours = decode_latents(parts.vae, latents * std + mean)[0]
    pipeline.set_progress_bar_config(disable=True)
    # diffusers begins at sigma_T x noise, ours at unit variance: the same but for the last bit of signal
    sigma = schedule.at(torch.tensor([999])).sigma
    theirs = pipeline(
        PROMPT, num_inference_steps=steps, width=width, height=height, guidance_scale=5.0, guidance_rescale=0.7,
        latents=noise / sigma,
    ).images[0]  # fmt: skip
    assert np.asarray(ours).std() > 10  # a picture, not a grey field
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max())


def strengthened(parts: Components) -> dict[str, torch.Tensor]:
    """Weights that differ from those in the UNet."""
    return {name: parameter * 1.5 for name, parameter in parts.unet.state_dict().items()}


@pytest.mark.parametrize(
    ("schedule", "p"), [(ztsnr(scaled_linear()), V()), (scaled_linear(), Epsilon()), (scaled_linear(), Sample())]
)
@pytest.mark.parametrize("steps", [8, 28])
def test_diffusers_paints_the_same_picture(tmp_path: Path, schedule: Schedule, p: Parameterization, steps: int) -> None:
    parts = tiny_sdxl(seed=1)
    mean, std = ScaleLatents().statistics(parts.vae, unmeasured)
    folder = save_pipeline(
        parts, strengthened(parts), schedule, p, mean=mean, std=std, resolution=128, path=tmp_path / "pipeline"
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    assert difference(parts, schedule, p, steps, (mean, std), pipeline) <= 2


PER_CHANNEL = {
    "per_channel": (torch.tensor([0.31, -0.92, 0.05, 1.4]), torch.tensor([1.9, 0.6, 1.1, 0.8])),
    "anime": (torch.tensor([4.8119, 0.1607, 1.3538, -1.7753]), torch.tensor([9.9181, 6.2753, 7.5978, 5.9956])),
}


@pytest.mark.parametrize("latents", PER_CHANNEL)
@pytest.mark.parametrize(("schedule", "p"), [(ztsnr(scaled_linear()), V()), (scaled_linear(), Epsilon())])
def test_diffusers_paints_the_same_picture_from_latents_normalised_by_channel(
    tmp_path: Path, schedule: Schedule, p: Parameterization, latents: str
) -> None:
    parts = tiny_sdxl(seed=1)
    mean, std = (values.view(4, 1, 1) for values in PER_CHANNEL[latents])
    folder = save_pipeline(
        parts, strengthened(parts), schedule, p, mean=mean, std=std, resolution=128, path=tmp_path / "pipeline"
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    assert pipeline.vae.config.latents_mean is None  # nothing that other programs would have to know of
    assert difference(parts, schedule, p, 8, (mean, std), pipeline) <= 2


def test_single_file_of_a_per_channel_run_decodes_as_its_pipeline(tmp_path: Path) -> None:
    parts = tiny_sdxl(seed=1)
    mean, std = (values.view(4, 1, 1) for values in PER_CHANNEL["per_channel"])
    folder = tmp_path / "run" / "pipeline"
    save_pipeline(
        parts, parts.unet.state_dict(), ztsnr(scaled_linear()), V(), mean=mean, std=std, resolution=128, path=folder
    )
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    normalised = (encode_pixels(parts.vae, pixels) - mean) / std
    expected = np.asarray(decode_latents(parts.vae, normalised * std + mean)[0], dtype=int)
    for dtype, tolerance, shade in (("fp32", 1e-4, 1), ("fp16", 0.05, 6)):
        file = export(tmp_path / "run", tmp_path / f"{dtype}.safetensors", dtype)
        vae = load_sdxl(file, config=folder).vae
        factor = parts.vae.config.scaling_factor
        torch.testing.assert_close(encode_pixels(vae, pixels) * factor, normalised, atol=tolerance, rtol=0)
        found = np.asarray(decode_latents(vae, normalised / factor)[0], dtype=int)
        assert np.abs(found - expected).max() <= shade


def test_plain_scale_exports_the_autoencoder_bit_for_bit(tmp_path: Path) -> None:
    parts = tiny_sdxl(seed=1)
    mean, std = ScaleLatents().statistics(parts.vae, unmeasured)
    save_pipeline(
        parts, strengthened(parts), ztsnr(scaled_linear()), V(), mean=mean, std=std, resolution=128,
        path=tmp_path / "pipeline",
    )  # fmt: skip
    again = AutoencoderKL.from_pretrained(tmp_path / "pipeline" / "vae")
    assert again.config.scaling_factor == parts.vae.config.scaling_factor
    assert all(torch.equal(tensor, parts.vae.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_run_becomes_a_single_file_that_says_what_it_is(tmp_path: Path) -> None:
    parts = tiny_sdxl(seed=1)
    mean, std = ScaleLatents().statistics(parts.vae, unmeasured)
    save_pipeline(
        parts, strengthened(parts), ztsnr(scaled_linear()), V(), mean=mean, std=std, resolution=128,
        path=tmp_path / "run" / "pipeline",
    )  # fmt: skip
    file = export(tmp_path / "run", tmp_path / "model.safetensors", "fp32")
    with safe_open(file, framework="pt") as content:
        assert {"v_pred", "ztsnr"} <= set(content.keys())
    again = load_sdxl(file, config=tmp_path / "run" / "pipeline")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), parts.unet.parameters(), strict=True))


@pytest.mark.parametrize("wrong", ["missing", "renamed", "more", "none"])
def test_weights_that_are_not_all_of_the_unet_are_refused(tmp_path: Path, wrong: str) -> None:
    parts = tiny_sdxl(seed=1)
    before, weights = {k: v.clone() for k, v in parts.unet.state_dict().items()}, strengthened(parts)
    if wrong in ("missing", "renamed"):
        taken = weights.pop("conv_out.bias")
        weights |= {"module.conv_out.bias": taken} if wrong == "renamed" else {}
    elif wrong == "more":
        weights["lora.weight"] = torch.zeros(3)
    else:
        weights = {}
    told = "lora.weight is none of" if wrong == "more" else "conv_(out.bias|in.weight) is missing"
    mean, std = ScaleLatents().statistics(parts.vae, unmeasured)
    with pytest.raises(ValueError, match=told):
        save_pipeline(
            parts, weights, scaled_linear(), V(), mean=mean, std=std, resolution=128, path=tmp_path / "pipeline"
        )
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.unet.state_dict().items())
