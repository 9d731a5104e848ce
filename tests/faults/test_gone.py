"""Files that go while a run trains: what is not needed costs nothing, what is needed is named, and the run goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from PIL import Image

from nai_xl.engine.hooks import NoHook
from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import cells
from nai_xl.train import train
from nai_xl.training import session
from tests.test_train import losses, same_weights

Compose = Callable[..., DictConfig]


@pytest.fixture
def after_step_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Does something once, after the first step of a run."""

    def at(act: Callable[[], Any]) -> None:
        loop = session.train

        class Act(NoHook):
            def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
                if step == 1:
                    act()

        def acting(run: Any, parts: Any, **kwargs: Any) -> int:
            parts.hooks = [Act(), *parts.hooks]
            monkeypatch.setattr(session, "train", loop)  # once
            return loop(run, parts, **kwargs)

        monkeypatch.setattr(session, "train", acting)

    return at


def test_a_data_folder_that_is_moved_away_costs_the_photographs_and_nothing_else(
    small: Compose, images: Path, after_step_1: Any
) -> None:
    choices = ["run.max_images=8", "evals.sample_grid.every=2"]
    undisturbed = train(small(*choices, "name=undisturbed"), {})
    after_step_1(lambda: images.rename(images.with_name("moved")))
    home = train(small(*choices), {})
    assert losses(home) == losses(undisturbed) and same_weights(home, undisturbed)
    for step in (2, 4):
        there, gone = (
            cells(Image.open(run / "samples" / f"step_{step:08d}.png").convert("RGB")) for run in (undisturbed, home)
        )
        assert len(there) == len(gone) == 2
        for one, other in zip(there, gone, strict=True):
            assert one.sample.tobytes() == other.sample.tobytes()
            assert one.reference is not None and other.reference is not None
            grey = other.reference.getcolors(1 << 16)
            assert max(grey)[1] == (160, 160, 160) and one.reference.tobytes() != other.reference.tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_is_deleted_ends_the_run_by_name_and_the_same_command_goes_on(
    small: Compose,
    tmp_path: Path,
    images: Path,
    after_step_1: Any,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = "run.max_images=10 run.checkpoint_every=1 cache.dir=cache ~evals.sample_grid".split()
    choices.append(f"run.workers={workers}")
    monkeypatch.setattr("nai_xl.data.cache.STAY_OPEN", 0)  # an open file can be read on
    undisturbed = train(small(*choices, "name=undisturbed"), {})
    after_step_1(lambda: shutil.rmtree(tmp_path / "cache"))
    with pytest.raises(UserError) as told:
        train(small(*choices), {})
    message = str(told.value)
    assert "\n" not in message and "gone" in message and "same command" in message and "cache/" in message
    assert str(images) in message or "the text '" in message
    (home,) = (path for path in (tmp_path / "outputs").iterdir() if "undisturbed" not in path.name)
    assert json.loads((home / "arm.json").read_text())["status"] == "FAILED"
    train(small(*choices), {})
    assert losses(home) == losses(undisturbed) and same_weights(home, undisturbed)


def test_a_picture_that_training_reads_itself_is_named(small: Compose, images: Path, after_step_1: Any) -> None:
    after_step_1(lambda: shutil.rmtree(images))
    with pytest.raises(UserError, match=rf"{images}/\d\d\.png can no longer be read .*same command again"):
        train(small("task=vae_decoder", "~evals.sample_grid", "run.max_images=12", "bucketing.resolution=64"), {})
