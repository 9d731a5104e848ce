"""Losses and gradients that are not finite: no weight moves, the cause is named, and the run can go on."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.record.run_dir import RunDirectory
from nai_xl.train import train
from tests.test_train import losses, rows, same_weights, weights

Compose = Callable[..., DictConfig]
STEPS = 7  # of two images each: the twelve, and two again
BAD = 5  # the step that meets the poisoned entry
COMMON = "run.log_every=6 run.checkpoint_every=3 cache.dir=cache ~evals.sample_grid ema.decay=0.5".split() + [
    f"run.max_images={2 * STEPS}"
]


@pytest.fixture
def poison(small: Compose, tmp_path: Path) -> Callable[..., Path]:
    """Fills the cache and makes the latent of an image of step BAD not finite; the file of that entry."""

    def poisoned(*overrides: str) -> Path:
        spec = Spec.of(small(*COMMON, *overrides))
        strategy = spec.start()
        spec.task.load(spec.model)
        data = spec.task.prepare(spec.scan(), spec.cache, strategy, RunDirectory(tmp_path / "none"))
        batch = next(iter(data.batches(spec.run, strategy, start=BAD - 1)))
        key = data.encoded.latents[int(batch.item[1])][0].key
        spec.cache.put(key, {"latents": spec.cache.get(key)["latents"] * math.nan})
        return Path(spec.cache.place(key))

    return poisoned


def run(cfg: DictConfig) -> Path:
    return train(cfg, {})


def only(folder: Path) -> Path:
    return next(folder.glob("outputs/*"))


@pytest.mark.parametrize(
    "choices",
    [
        [],
        ["loss=uncertainty"],
        ["optimizer=adafactor", "precision=bf16", "ema.device=cpu"],
        ["optimizer=adamw8bit", "memory=[sdpa,bf16_weights]"],
        ["memory=[sdpa,optimizer_in_backward]", "loss=uncertainty", "precision=bf16"],
        ["optimizer._target_=torch.optim.RMSprop", "~optimizer.fused", "~optimizer.betas", "loss=uncertainty"],
        ["optimizer.fused=false", "memory=[sdpa,optimizer_in_backward]"],
    ],
    ids=lambda choices: " ".join(choices) or "defaults",
)
def test_a_bad_entry_stops_the_run_before_anything_is_saved_and_the_same_command_goes_on(
    small: Compose, poison: Callable[..., Path], tmp_path: Path, choices: list[str]
) -> None:
    entry = poison(*choices)
    with pytest.raises(UserError) as told:
        run(small(*COMMON, *choices))
    home = only(tmp_path)
    message = str(told.value)
    assert str(entry) in message and "images/" in message and f"step {BAD}" in message
    assert re.search(r"position 9, timestep \d+, alpha [\d.e-]+, sigma [\d.e-]+", message)
    for saved in (home / "checkpoints").iterdir():
        for file in saved.glob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point()), file
    entry.unlink()
    again = run(small(*COMMON, *choices))
    undisturbed = run(small(*COMMON, *choices, "name=undisturbed"))
    assert again.name == home.name and losses(home) == losses(undisturbed) and same_weights(home, undisturbed)


def bad_steps(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "outbox.jsonl").read_text().splitlines())
    return [step for row in lines if row["kind"] == "nonfinite" for step in row["steps"]]


@pytest.mark.parametrize("choices", [[], ["optimizer=adafactor"], ["memory=[sdpa,optimizer_in_backward]"]])
def test_a_skipped_step_is_left_out_counted_and_named(
    small: Compose, poison: Callable[..., Path], capsys: pytest.CaptureFixture[str], choices: list[str]
) -> None:
    entry = poison(*choices)
    home = run(small(*COMMON, *choices, "run.on_nonfinite=skip"))
    steps = bad_steps(home)
    assert steps == [BAD] and rows(home)[STEPS]["train/skipped_steps"] == 1
    assert all(math.isfinite(loss) for loss in losses(home).values())
    assert str(entry) in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in weights(home).values())


def test_a_skipped_step_moves_nothing_but_the_average(small: Compose, poison: Callable[..., Path]) -> None:
    poison()
    every = ["run.checkpoint_every=1", "run.log_every=1", "run.keep_checkpoints=100", "run.on_nonfinite=skip"]
    home = run(small(*COMMON, *every))
    before, after = (home / "checkpoints" / f"step_{step:08d}" for step in (BAD - 1, BAD))
    for part in ("unet", "optimizer"):
        one, other = load_file(before / f"{part}.safetensors"), load_file(after / f"{part}.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in one), part
    one, other = load_file(before / "ema.safetensors"), load_file(after / "ema.safetensors")
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_more_skipped_steps_than_the_limit_end_the_run(small: Compose, poison: Callable[..., Path]) -> None:
    poison()
    with pytest.raises(UserError, match=r"1 steps of this run .* run\.max_nonfinite=0"):
        run(small(*COMMON, "run.on_nonfinite=skip", "run.max_nonfinite=0"))


def test_a_run_that_stopped_goes_on_with_skip(small: Compose, poison: Callable[..., Path], tmp_path: Path) -> None:
    poison()
    with pytest.raises(UserError):
        run(small(*COMMON))
    home = run(small(*COMMON, "run.on_nonfinite=skip"))
    assert home.name == only(tmp_path).name and sorted(rows(home)) == [6, STEPS]
