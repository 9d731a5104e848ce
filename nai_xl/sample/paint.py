"""python -m nai_xl.sample RUN "a prompt" [...]: paint prompts with a finished run, exactly as it was trained.

What is not asked for otherwise is as in the run's own sample grids. Every PNG carries its prompt, seed and settings,
and the same ones paint the same picture.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nai_xl import config
from nai_xl.diffusion.sampling import SOLVERS, Sampling
from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.evals.painter import Painter
from nai_xl.interfaces import Bucket, Denoiser
from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.text import encode_texts
from nai_xl.model.vae import decode_latents
from nai_xl.record.run_dir import RunDirectory

NEEDED = ["plugins", "native", "run", "schedule", "parameterization", "sampling", "text", "precision"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def read_config(run: Path) -> DictConfig:
    """The config that `run` was trained with. Raises UserError when `run` is no run or does not fit this package."""
    try:
        cfg = config.stored_config(run)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run}: no run here (no config.yaml); give a folder that nai_xl.train has made") from error
    if lacking := [key for key in NEEDED if key not in cfg]:
        raise UserError(f"{run / 'config.yaml'} lacks {', '.join(lacking)}; give a folder that nai_xl.train has made")
    config.check(OmegaConf.masked_copy(cfg, NEEDED))
    return cfg


def painter(run: Path, cfg: DictConfig, device: torch.device, **settings: float | str | None) -> Painter:
    """A painter with the averaged weights of the run's pipeline; `settings` that are not None replace its sampling's.

    `cfg` is the run's config. Raises UserError when there is no pipeline yet, and for settings that cannot be.
    """
    build = functools.partial(config.build, plugins=tuple(cfg.plugins))
    sampling: Sampling = replace(build(cfg.sampling), **{k: v for k, v in settings.items() if v is not None})
    schedule = build(cfg.schedule)
    schedule.inference_timesteps(sampling.steps)  # refuses more steps than there are before any weight is read
    pipeline = RunDirectory(run).pipeline
    if not pipeline.is_dir():
        raise UserError(f"{run} holds no pipeline yet; a run writes it when it is finished")
    parts = load_sdxl(pipeline)
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.to(device)
    chunks = build(cfg.text).chunks

    def condition(text: str) -> tuple[Tensor, Tensor]:
        context, pooled = encode_texts(parts.tokenizers, parts.text_encoders, [text], chunks=chunks)
        return context[0], pooled[0]

    return Painter(
        denoise=_as_trained(parts, cfg.precision.autocast, device),
        schedule=schedule,
        parameterization=build(cfg.parameterization),
        sampling=sampling,
        condition=condition,
        decode=lambda latents: decode_latents(parts.vae, latents / parts.vae.config.scaling_factor),
        device=device,
    )


def _as_trained(parts: Components, mixed_precision: str, device: torch.device) -> Denoiser:
    """The UNet in the precision of the run."""
    dtype = AUTOCAST.get(mixed_precision)
    return torch.autocast(device.type, dtype)(parts.unet.forward) if dtype else parts.unet


def parse_size(text: str) -> Bucket:
    """ "160x96" -> a canvas 160 wide and 96 high. Raises UserError unless both are positive multiples of 8."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    size = Bucket(*map(int, found.groups())) if found else Bucket(0, 0)
    if min(size) == 0 or size.width % 8 or size.height % 8:
        raise UserError(f"--size {text}: give WIDTHxHEIGHT in multiples of 8 pixels, such as 160x96")
    return size


def paint(run: Path, arguments: argparse.Namespace) -> list[Path]:
    """Write `count` pictures of every prompt, from the seeds seed, seed + 1, ..., and tell where they are."""
    cfg = read_config(run)
    native = f"{cfg.native.resolution}x{cfg.native.resolution}"
    size = parse_size(arguments.size or native)
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be at least 1")
    settings = {name: getattr(arguments, name) for name in ("steps", "guidance", "rescale", "method")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    artist = painter(run, cfg, device, **settings)
    out = arguments.out or run / "painted"
    paths = []
    for text in arguments.prompts:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            # one at a time, so that a picture does not depend on what else is asked for
            image = artist.paint([Prompt(text, size)], seed, negative=arguments.negative)[0]
            said = {"prompt": text, "negative": arguments.negative, "seed": seed, "size": size.name}
            paths.append(save(image, {**said, **asdict(artist.sampling), "run": run.resolve().name}, out))
            print(paths[-1])
    return paths


def save(image: Image.Image, said: dict[str, str | float], folder: Path) -> Path:
    """Write a PNG that says how it was made, named after its prompt, its seed and a hash of all the rest.

    Raises UserError when `folder` cannot be written.
    """
    notes = PngInfo()
    for key, value in said.items():
        notes.add_itxt(key, str(value))
    words = "-".join(re.findall(r"\w+", str(said["prompt"]).lower()))[:40] or "empty"
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:6]
    path = folder / f"{words}-{said['seed']}-{digest}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        image.save(path, pnginfo=notes)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from error
    return path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `arguments`."""
    parser = argparse.ArgumentParser(prog="nai_xl.sample", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run directory with a pipeline/")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; the model's native square if left out")
    parser.add_argument("--steps", type=int, help="the run's own if left out, as the next three")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
    parser.add_argument("--method", choices=SOLVERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, from seed, seed + 1, ...")
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument("--out", type=Path, help="RUN/painted if left out")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    quiet_libraries()
    try:
        paint(arguments.run, arguments)
    except (UserError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
