"""Does min-SNR's zero weight at the terminal step show? Solid colour cards, zero terminal SNR, three loss weightings.

python experiments/terminal_step/run.py        # writes results.csv and figure.png beside this file
"""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from matplotlib import pyplot as plt
from PIL import Image

from nai_xl import config
from nai_xl import train as program
from nai_xl.model.quiet import quiet_libraries

HERE = Path(__file__).parent
ARMS = ("uniform", "minsnr", "minsnr_plus_one")
SEEDS = (0, 1, 2)
IMAGES = (1600, 4800)  # seen in training, at each of which samples are measured
GUIDANCE = (1.0, 5.0)
EDGE = 64
COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (220, 20, 20), "green": (20, 160, 40),
    "blue": (20, 40, 220), "yellow": (250, 230, 20), "orange": (250, 130, 10), "purple": (120, 20, 160),
    "pink": (255, 150, 190), "brown": (110, 60, 20), "cyan": (30, 200, 220),
}  # fmt: skip


Row = dict[str, object]


def caption(colour: str) -> str:
    return f"a completely {colour} image"


def write_cards(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rgb in COLOURS.items():
        Image.new("RGB", (EDGE, EDGE), rgb).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption(name))
    return folder


def train(arm: str, seed: int, images: int, cards: Path) -> Path:
    """Train one arm up to `images`, continuing what an earlier call began; its pipeline."""
    cfg = config.compose(
        [f"loss={arm}", "schedule=ztsnr", f"run.seed={seed}", f"run.max_images={images}", f"name=terminal_{arm}_{seed}",
         "data=folder", f"data.dir={cards}", "bucketing=square", f"native.resolution={EDGE}", "tracker=jsonl",
         "evals=[]", "run.log_every=50"]
    )  # fmt: skip
    config.check(cfg)
    return program.train(cfg, {"schedule": "ztsnr", "loss": arm}) / "pipeline"


def colour_errors(pipeline: Path, guidance: float, seed: int) -> dict[str, float]:
    """Root mean square error, in 8-bit steps, of the mean colour painted for each prompt."""
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        [caption(name) for name in COLOURS], width=EDGE, height=EDGE, num_inference_steps=28, guidance_scale=guidance,
        guidance_rescale=0.7, generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    means = {name: np.asarray(image, dtype=float).mean((0, 1)) for name, image in zip(COLOURS, made, strict=True)}
    return {name: float(np.sqrt(np.mean((means[name] - COLOURS[name]) ** 2))) for name in COLOURS}


def measure() -> list[Row]:
    cards = write_cards(Path("outputs") / "colour_cards")
    rows: list[Row] = []
    for arm, seed, images in itertools.product(ARMS, SEEDS, IMAGES):
        pipeline = train(arm, seed, images, cards)
        for guidance in GUIDANCE:
            errors = colour_errors(pipeline, guidance, seed)
            for name, error in errors.items():
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "images": images,
                        "guidance": guidance,
                        "colour": name,
                        "error": round(error, 2),
                    }
                )
    return rows


def summary(rows: list[Row], arm: str, images: int, guidance: float, colours: Sequence[str]) -> np.ndarray:
    """Mean error over `colours`, one number a seed."""
    place = (arm, images, guidance)
    chosen = [r for r in rows if (r["arm"], r["images"], r["guidance"]) == place and r["colour"] in colours]
    return np.array([np.mean([r["error"] for r in chosen if r["seed"] == seed]) for seed in SEEDS])


def draw(rows: list[Row]) -> None:
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, len(GUIDANCE), figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, guidance in zip(panels, GUIDANCE, strict=True):
        for arm in ARMS:
            seeds = np.array([summary(rows, arm, images, guidance, tuple(COLOURS)) for images in IMAGES])
            (line,) = panel.plot(IMAGES, seeds.mean(1), marker="o", label=arm)
            panel.fill_between(IMAGES, seeds.min(1), seeds.max(1), color=line.get_color(), alpha=0.15)
        panel.set(title=f"guidance {guidance:g}", xlabel="images seen", xscale="log", xticks=IMAGES, xticklabels=IMAGES)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="colour error (RMS, 8-bit steps)")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(frameon=False)
    figure.savefig(HERE / "figure.png", dpi=130)


def main() -> None:
    quiet_libraries()
    rows = measure()
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(rows)
    for guidance, images in itertools.product(GUIDANCE, IMAGES):
        for arm in ARMS:
            every = summary(rows, arm, images, guidance, tuple(COLOURS))
            extreme = summary(rows, arm, images, guidance, ("black", "white"))
            print(
                f"guidance {guidance:g}  {images:5d} images  {arm:16s}"
                f"   all {every.mean():6.2f} +- {every.std(ddof=1):5.2f}"
                f"   black and white {extreme.mean():6.2f} +- {extreme.std(ddof=1):5.2f}"
            )


if __name__ == "__main__":
    main()
