"""Painting what a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.sample.config import read_config
from nai_xl.sample.painter import painter
from nai_xl.sample.picture import parse_size, save


def paint(asked: argparse.Namespace) -> Iterator[Path]:
    """Write `count` pictures of every prompt, from the seeds seed, seed + 1, ...; the path of each once it is written.

    `asked` holds what the command line of __main__ reads. Raises UserError for what cannot be painted.
    """
    run: Path = asked.run
    cfg = read_config(run)
    size = parse_size(asked.size or f"{cfg.native.resolution}x{cfg.native.resolution}")
    if asked.count < 1:
        raise UserError(f"--count {asked.count}: must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {"steps": asked.steps, "guidance": asked.guidance, "rescale": asked.rescale, "method": asked.method}
    artist = painter(run, cfg, device, **sampling)
    for text in asked.prompts:
        for seed in range(asked.seed, asked.seed + asked.count):
            # one at a time, so that a picture does not depend on what else is asked for
            image = artist.paint([Prompt(text, size)], seed, negative=asked.negative)[0]
            settings = {"prompt": text, "negative": asked.negative, "seed": seed, "size": size.name}
            settings |= {**asdict(artist.sampling), "run": run.resolve().name}
            yield save(image, settings, asked.out or run / "painted")
