"""A short training run for every option of the method; a new yaml is covered by itself."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from omegaconf import DictConfig

from nai_xl import config
from nai_xl.data import loader
from nai_xl.rng import draws
from nai_xl.train import train
from tests.test_train import losses

GROUPS = ("schedule", "parameterization", "timesteps", "loss", "error", "latents")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config.conf_dir() / group).glob("*.yaml"))]
# epsilon has no meaning on the default schedule
ALSO = {("parameterization", "epsilon"): ["schedule=scaled_linear"]}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_trains(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, group: str, option: str
) -> None:
    """The rate is the tiny model's own; the weights' scale differs by option, so only the fall is asserted. Every step
    has the noise and the timesteps of the first, so that ten steps show it.
    """
    monkeypatch.setattr(loader, "draws", lambda seed, position: draws(seed, position % 4))
    further = [*ALSO.get((group, option), []), "native.resolution=64", "~evals.sample_grid"]
    home = train(small(f"{group}={option}", *further, "run.max_images=40", "run.batch_size=4"), {})
    found = list(losses(home).values())
    assert len(found) == 10 and all(map(math.isfinite, found))
    assert np.mean(found[-3:]) < 0.9 * np.mean(found[:3])
