"""hooks=spike: what is unusual, told once, the same after a restart."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from nai_xl.config.identity import signature
from nai_xl.engine.hooks import Surroundings
from nai_xl.engine.spike import Spike
from nai_xl.errors import UserError
from nai_xl.train import train

USUAL = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.0, 1.05]


def watched(losses: Sequence[float], folder: Path, start: int = 0, **settings: Any) -> list[str]:
    """What is said of these losses; those up to `start` were reported before a restart."""
    rows = [{"step": step, "time": 0, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:start]))
    said: list[str] = []
    spike = Spike(**settings)
    spike.begin(Surroundings(folder, None, None, said.append, start, len(losses)))  # type: ignore[arg-type]
    for step, loss in enumerate(losses[start:], start + 1):
        spike(step, {}, last=False)
        spike(step, {"train/loss": loss}, last=False)
    return said


def test_a_spike_is_told_once_with_its_step_before_and_after_a_restart(tmp_path: Path) -> None:
    losses = [*USUAL, 9.0, 9.5, *USUAL, 7.0, *USUAL]
    said = watched(losses, tmp_path)
    assert [line.split(":")[0] for line in said] == ["step 11", "step 23"]
    # median 1, median absolute deviation 0.05: (9 - 1) / (1.4826 x 0.05)
    assert "train/loss 9 is a spike, 107.9 deviations above the usual 1" in said[0]
    for start in (5, 10, 11, 15):
        assert watched(losses, tmp_path, start) == [line for line in said if int(line.split()[1][:-1]) > start]


def test_noise_falls_and_too_few_reports_are_no_spikes(tmp_path: Path) -> None:
    assert not watched([*USUAL, 1.3, 0.01, -4.0], tmp_path)
    assert not watched([1.0, 1.1, 0.9, 50.0], tmp_path)
    assert not watched([1.0] * 20, tmp_path)
    assert len(watched([*USUAL, 1.3], tmp_path, deviations=3.0)) == 1


def test_a_spike_can_end_the_run_and_is_no_part_of_what_it_is(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = ["hooks=[spike]", "hooks.spike.stop=true", "run.max_images=12", "run.checkpoint_every=3"]
    assert signature(small(*chosen)) == signature(small("run.max_images=12"))
    take = Spike._take

    def taken(self: Spike, loss: float) -> tuple[float, float]:
        found = take(self, loss)
        self.inside = len(self.recent) == 5
        return found

    monkeypatch.setattr(Spike, "_take", taken)
    with pytest.raises(UserError, match=r"step 5: train/loss .* is a spike.*hooks\.spike\.stop=false"):
        train(small(*chosen), {})
    assert [path.name for path in tmp_path.glob("outputs/*/checkpoints/*")] == ["step_00000003"]
