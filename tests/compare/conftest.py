"""The sweep of losses.py, compared in the ways that a user compares it."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest

from nai_xl.compare.__main__ import main
from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.question import Question
from nai_xl.compare.runs.directory import read_directory
from tests.compare.losses import ASKED, BAD, BASE, EFFECTS, GOOD, LOST, METRICS, QUESTION, SAME, Command, sheet
from tests.synthetic import write_run


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over losses: one better, one an A/A arm, one worse that lacks seed 3, one that failed altogether."""
    folder = tmp_path_factory.mktemp("sweep") / "outputs"
    for shade, arm in enumerate((BASE, GOOD, SAME, BAD, LOST)):
        for seed in range(4):
            if (arm, seed) == (BAD, 3):
                continue
            write_run(
                folder, arm, seed, sweep="losses", effect=EFFECTS[arm["loss"]], overrides=[f"loss={arm['loss']}"],
                status="FAILED" if arm is LOST else "FINISHED", error="loss is not finite" if arm is LOST else None,
                steps=[] if arm is LOST else range(100, 801, 100), sheet=sheet(40 * shade), question=ASKED,
            )  # fmt: skip
    return folder


@pytest.fixture
def told(outputs: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str]) -> Command:
    """Runs the command beside the sweep; what it printed."""
    monkeypatch.chdir(outputs.parent)
    return partial(typed, main)


@pytest.fixture(scope="session")
def found(outputs: Path) -> Comparison:
    runs = [read_directory(path, {}, "losses") for path in sorted(outputs.glob("*-[0123]"))]
    return compare(runs, Question("losses", QUESTION, "loss=uniform", METRICS))


@pytest.fixture(scope="session")
def report(outputs: Path) -> tuple[str, Path]:
    """What the command prints about the sweep, and where its report lies."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(outputs.parent)
        patch.setattr(sys, "argv", ["compare", "sweep=losses"])
        main()
    return printed.getvalue(), outputs / "compare-losses"
