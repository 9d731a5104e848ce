"""Run directories that look like a finished sweep's, made of known effects and noise instead of training."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw

from nai_xl import config

STEPS, BATCH = range(100, 801, 100), 16


def write_run(
    folder: Path,
    arm: Mapping[str, str],
    seed: int,
    *,
    effect: Mapping[str, float],
    sweep: str = "choices",
    overrides: Sequence[str] = (),
    status: str = "FINISHED",
    error: str | None = None,
    steps: Sequence[int] = STEPS,
    items: int = 24,
    sheet: Image.Image | None = None,
    question: Mapping[str, object] = {},
) -> Path:
    """One run: each metric of `effect` is a falling curve shifted at its end by so much. Noise of a seed and of an item
    is the same in every arm, as it is in paired runs; a hundredth of it is the arm's own.
    """
    path = folder / f"{'-'.join(arm.values())}-{seed}"
    (path / "items").mkdir(parents=True)
    curves: dict[int, dict[str, float]] = {step: {} for step in steps}
    for number, (metric, shift) in enumerate(effect.items()):
        shared = np.random.default_rng([number, seed]).normal(0, 0.02)
        by_item = np.random.default_rng([number, 999]).normal(0, 0.05, items)
        own = np.random.default_rng([number, seed, *map(ord, str(dict(arm)))]).normal(0, 0.004, (len(steps), items))
        lines = []
        for row, step in enumerate(steps):
            level = 0.3 + 0.6 * np.exp(-step / 150) + shift * step / max(steps) + shared
            values = level + by_item + own[row] * (shift != 0)
            curves[step][metric] = float(values.mean())
            lines.append({"step": step, "values": {f"image{i:02}": float(v) for i, v in enumerate(values)}})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "items" / f"{metric.replace('/', '__')}.jsonl").write_text(text)
    with (path / "metrics.jsonl").open("w") as file:
        for step, values in curves.items():
            perf = {"perf/images_per_second": 100.0 - len(arm) + seed, "perf/peak_memory_gib": 1.5 + 0.1 * seed}
            file.write(json.dumps({"step": step, "time": 0, "train/loss": 0.5, **perf, **values}) + "\n")
    done = max(steps, default=0)
    note = {
        "sweep": sweep, "arm": dict(arm), "seed": seed, "status": status, "error": error, "signature": "0" * 8,
        "seconds": 60.0 + seed, "steps": done, "images": BATCH * done,
    }  # fmt: skip
    (path / "arm.json").write_text(json.dumps(note))
    cfg = _composed(tuple(overrides)).copy()
    cfg.run.seed = seed
    OmegaConf.save(OmegaConf.create({**cfg, "sweep": dict(question)}), path / "config.yaml", resolve=True)
    if sheet is not None:
        (path / "samples").mkdir()
        sheet.save(path / "samples" / f"step_{done:08d}.png")
    return path


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return config.compose([*overrides])


def blob(seed: int, shade: int, size: int = 96) -> Image.Image:
    """A picture of one bright disc on a dark ground; `shade` 0..255 is the ground's."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(int(c) for c in random.integers(0, 60, 3) + shade // 2))
    x, y, r = random.integers(20, 70, 3)
    ImageDraw.Draw(image).ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=(240, 180 - shade // 2, 90))
    return image
