"""Shared by all tests: a cache of their own, commands typed in this process, and small photographs to train on."""

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from omegaconf import DictConfig
from PIL import Image
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from nai_xl import config, train
from nai_xl.data.report import Report
from nai_xl.evals import canvas_figure, method_figure
from nai_xl.evals.method_figure import Legend, Variant
from nai_xl.interfaces import Batch
from tests.forks import Fork

settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")

torch.set_num_threads(1)  # small tensors: threads cost more than they bring


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("NAI_XL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def swept_often() -> Iterator[None]:
    """Modules are left out of garbage collections: a whole one is cheap then, and comes before the models of tests that
    are over take gigabytes.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlflow.set_tracking_uri, as a test may call it, sets this variable for all that follows in the process."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks run torch's traced graphs as they are: making kernels of them takes a minute and a compiler."""
    monkeypatch.setattr("nai_xl.memory.compile.BACKEND", "aot_eager")


DRAWN: dict[tuple[bytes, ...], Image.Image] = {}  # figures of the method, by all that goes into them


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """Equal figures of the method are drawn once in a process: one takes as long as the rest of a short run."""

    def method(variants: Sequence[Variant], title: str, *headings: Legend) -> Image.Image:
        tables = [table.numpy().tobytes() for v in variants for table in vars(v.diagnosis).values()]
        words = repr([title, *headings, *((v.colour, v.style) for v in variants)]).encode()
        key = (words, *tables)
        if key not in DRAWN:
            DRAWN[key] = draw(variants, title, *headings)
        return DRAWN[key].copy()

    draw = method_figure.method
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method_figure, "method", method)
        yield


CANVASES: dict[str, Image.Image] = {}


@pytest.fixture(autouse=True)
def canvases_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def canvases(report: Report, skipped: int) -> Image.Image:
        key = repr((report, skipped))
        if key not in CANVASES:
            CANVASES[key] = draw(report, skipped)
        return CANVASES[key].copy()

    draw = canvas_figure.canvases
    monkeypatch.setattr(canvas_figure, "canvases", canvases)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command's main() with these arguments; what it printed, or its error when it must stop with `status`."""

    def run(main: Callable[[], None], *arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        if status:
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == status
            return capsys.readouterr().err
        main()
        return capsys.readouterr().out

    return run


def twelve(folder: Path) -> Path:
    """Twelve captioned pictures in three aspect ratios, four each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        width, height = [(96, 96), (160, 96), (96, 160)][number % 3]
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return twelve(tmp_path / "images")


SMALL = (
    "data=folder tracker=jsonl evals.sample_grid.count=2 evals.sample_grid.every=100 sampling.steps=2 "
    "run.batch_size=2 run.log_every=1 run.checkpoint_every=100 lr.warmup=0"
).split()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, own_cache: Path, drawn_once: None) -> None:
    """A run in this process: what runs make once in a process, its forks find made."""
    folder = tmp_path_factory.mktemp("once")
    words = [f"data.dir={twelve(folder / 'images')}", f"output_dir={folder}", "run.max_images=2"]
    train.train(config.compose([*SMALL, *words]), {})


@pytest.fixture
def forks(trained_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that this test starts, and those that they start, are forks of its process, see tests/forks.py."""
    monkeypatch.setattr(subprocess_handler, "Popen", Fork)  # torchrun's
    monkeypatch.setattr(subprocess, "Popen", Fork)


@pytest.fixture
def small(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """A checked config of a run of seconds on `images`, with these overrides, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)

    def compose(*overrides: str) -> DictConfig:
        cfg = config.compose([*SMALL, f"data.dir={images}", *overrides])
        config.check(cfg)
        return cfg

    return compose


def joined(samples: list[Batch]) -> Batch:
    """One Batch of all samples, which share a bucket and so every shape."""
    return Batch(**{name: torch.cat([getattr(s, name) for s in samples]) for name in Batch.__dataclass_fields__})


class Alone:
    """What checkpoints ask of the strategy of a single process."""

    first = True
    rank, world = 0, 1

    def wait(self) -> None:
        pass

    def gather_objects(self, rows: list[Any]) -> list[Any]:
        return rows
