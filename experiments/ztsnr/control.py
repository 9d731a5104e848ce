"""Lost signal or strong noise? The shifted model's samples begun from what it was trained on: alpha x0 + sigma n.

    python -m nai_xl.train -m experiment=ztsnr sweep.name=control \\
        "sweep.arms=[{schedule: shifted, schedule.resolution: 512, parameterization: v, noise.offset: 0}]"
    python experiments/ztsnr/control.py outputs/RUN ...

A model whose last step leaves signal takes the mean colour from its input. Sampling begins from n alone, without any.
If that is the reason for grey samples, the true signal in the first input mends them; if the model were simply worse at
so much noise, it would not. Writes control.csv: for each run, colour and noise the color/error of both beginnings.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nai_xl.config.legacy import stored_config
from nai_xl.data.images import to_pixels
from nai_xl.data.source.drawing import PALETTE, Scene
from nai_xl.diffusion.sampling import sample_latents
from nai_xl.evals.color import color_error
from nai_xl.evals.painter import Painter
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.vae import encode_pixels
from nai_xl.record.run_dir import RunDirectory
from nai_xl.rng import generator
from nai_xl.sample.painter import painter

NOISES, EDGE, STEPS = 4, 64, 16
COLUMNS = ("seed", "colour", "noise", "from_noise", "from_signal")


@torch.no_grad()
def latents_of_colours(run: Path) -> Tensor:
    """Normalised latents of one card of each colour of the palette, [10,4,8,8]."""
    vae = load_sdxl(RunDirectory(run).pipeline).vae
    cards = [to_pixels(Image.new("RGB", (EDGE, EDGE), rgb)) for rgb in PALETTE.values()]
    return encode_pixels(vae, torch.stack([torch.as_tensor(card) for card in cards])) * vae.config.scaling_factor


def painted(brush: Painter, start: Tensor) -> Iterator[np.ndarray]:
    """The sample [H, W, 3] of each colour's prompt from this first input."""
    pairs = [brush.condition(Scene("{}").caption.replace("{}", colour)) for colour in PALETTE]
    size = [float(EDGE), float(EDGE), 0.0, 0.0, float(EDGE), float(EDGE)]
    condition = {
        "context": torch.stack([context for context, _ in pairs]),
        "pooled": torch.stack([pooled for _, pooled in pairs]),
        "time_ids": torch.tensor([size] * len(pairs)),
    }
    latents = sample_latents(
        brush.denoise,
        start,
        brush.schedule.for_canvas(EDGE, EDGE),
        brush.parameterization,
        condition=condition,
        unconditional=condition,
        sampling=brush.sampling,
    )
    for latent in latents:
        yield np.asarray(brush.decode(latent[None])[0])


def measured(run: Path) -> Iterator[dict[str, object]]:
    cfg = stored_config(run)
    brush = painter(run, cfg, torch.device("cpu"), steps=STEPS, guidance=1.0)
    schedule = brush.schedule.for_canvas(EDGE, EDGE)
    last = schedule.at(schedule.inference_timesteps(STEPS)[:1])
    x0 = latents_of_colours(run)
    for number in range(NOISES):
        noise = torch.stack(
            [torch.randn(x0.shape[1:], generator=generator(number, row, "control")) for row in range(len(x0))]
        )
        begun = {"from_noise": noise, "from_signal": schedule.add_noise(x0, noise, last)}
        pictures = {name: list(painted(brush, start)) for name, start in begun.items()}
        for place, (colour, rgb) in enumerate(PALETTE.items()):
            errors = {name: round(color_error(some[place], rgb), 6) for name, some in pictures.items()}
            yield {"seed": cfg.run.seed, "colour": colour, "noise": number, **errors}


def main(runs: Sequence[str]) -> None:
    rows = [row for run in runs for row in measured(Path(run))]
    with (Path(__file__).parent / "control.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    seeds = sorted({row["seed"] for row in rows})
    for name in COLUMNS[3:]:
        by_seed = [np.mean([row[name] for row in rows if row["seed"] == seed]).round(4) for seed in seeds]
        print(name, np.mean(by_seed).round(4), "by seed", *by_seed)


if __name__ == "__main__":
    main(sys.argv[1:])
