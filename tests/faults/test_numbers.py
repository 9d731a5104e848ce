"""Losses and gradients that are not finite: no weight moves, the cause is named, and the run can go on."""

import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from nai_xl.config.spec import Spec
from nai_xl.engine import loop
from nai_xl.engine.hooks import NoHook
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError
from nai_xl.optimizer.ema import StandardEma
from nai_xl.optimizer.update import WholeUpdate
from nai_xl.precompute import verify
from nai_xl.record.run_dir import RunDirectory
from nai_xl.train import train
from nai_xl.training import session
from tests.conftest import SMALL
from tests.test_train import losses, rows, same_weights, weights

Compose = Callable[..., DictConfig]
ROOT = Path(__file__).parents[2]
STEPS = 7  # of two images each: the twelve, and two again
BAD = 5  # the step that meets the poisoned entry
COMMON = (
    "run.log_every=6 run.checkpoint_every=3 cache.dir=cache ~evals.sample_grid ema.decay=0.5 "
    f"run.max_images={2 * STEPS}"
).split()


@pytest.fixture
def poison(small: Compose, tmp_path: Path) -> Callable[..., str]:
    """Fills the cache and makes the latent of an image of step BAD not finite; where that entry lies."""

    def poisoned(*overrides: str) -> str:
        spec = Spec.of(small(*COMMON, *overrides))
        strategy = spec.start()
        spec.task.load(spec.model)
        data = spec.task.prepare(spec.scan(), spec.cache, strategy, RunDirectory(tmp_path / "none"))
        batch = next(iter(data.batches(spec.run, strategy, start=BAD - 1)))
        key = data.encoded.latents[int(batch.item[1])][0].key
        spec.cache.put(key, {"latents": spec.cache.get(key)["latents"] * math.nan})
        spec.cache.seal()
        place: str = spec.cache.place(key)
        return place

    return poisoned


def discard_what_is_bad(cfg: DictConfig) -> None:
    """As the message says."""
    with pytest.raises(UserError, match="1 of 25 entries are damaged, and are discarded now"):
        verify(cfg, {})


def run(cfg: DictConfig) -> Path:
    return train(cfg, {})


def only(folder: Path) -> Path:
    return next(folder.glob("outputs/*"))


@pytest.mark.parametrize(
    "choices",
    [
        ["loss=uncertainty"],
        ["optimizer=adafactor", "precision=bf16", "memory=[sdpa,bf16_weights]"],
        ["memory=[sdpa,optimizer_in_backward]", "loss=uncertainty", "precision=bf16"],
    ],
    ids=lambda choices: " ".join(choices) or "defaults",
)
def test_a_bad_entry_stops_the_run_before_anything_is_saved_and_the_same_command_goes_on(
    small: Compose, poison: Callable[..., str], tmp_path: Path, choices: list[str]
) -> None:
    entry = poison(*choices)
    with pytest.raises(UserError) as told:
        run(small(*COMMON, *choices))
    home = only(tmp_path)
    message = str(told.value)
    assert entry in message and "images/" in message and f"step {BAD}" in message
    assert re.search(r"position 9, timestep \d+, alpha [\d.e-]+, sigma [\d.e-]+", message)
    for saved in (home / "checkpoints").iterdir():
        for file in saved.glob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point()), file
    discard_what_is_bad(small(*COMMON, *choices))
    again = run(small(*COMMON, *choices))
    undisturbed = run(small(*COMMON, *choices, "name=undisturbed"))
    assert again.name == home.name and losses(home) == losses(undisturbed) and same_weights(home, undisturbed)


def bad_steps(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "outbox.jsonl").read_text().splitlines())
    return [step for row in lines if row["kind"] == "nonfinite" for step in row["steps"]]


def test_a_skipped_step_is_left_out_counted_and_named(
    small: Compose, poison: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    entry = poison()
    home = run(small(*COMMON, "run.on_nonfinite=skip"))
    steps = bad_steps(home)
    assert steps == [BAD] and rows(home)[STEPS]["train/skipped_steps"] == 1
    assert all(math.isfinite(loss) for loss in losses(home).values())
    assert entry in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in weights(home).values())


def test_a_skipped_step_moves_nothing_but_the_average(small: Compose, poison: Callable[..., str]) -> None:
    poison()
    every = ["run.checkpoint_every=1", "run.log_every=1", "run.keep_checkpoints=100", "run.on_nonfinite=skip"]
    home = run(small(*COMMON, *every))
    before, after = (home / "checkpoints" / f"step_{step:08d}" for step in (BAD - 1, BAD))
    for part in ("unet", "optimizer"):
        one, other = load_file(before / f"{part}.safetensors"), load_file(after / f"{part}.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in one), part
    one, other = load_file(before / "ema.safetensors"), load_file(after / "ema.safetensors")
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_more_skipped_steps_than_the_limit_end_the_run(small: Compose, poison: Callable[..., str]) -> None:
    poison()
    with pytest.raises(UserError, match=r"1 steps of this run .* run\.max_nonfinite=0"):
        run(small(*COMMON, "run.on_nonfinite=skip", "run.max_nonfinite=0"))


def test_a_run_that_stopped_goes_on_with_skip(small: Compose, poison: Callable[..., str], tmp_path: Path) -> None:
    poison()
    with pytest.raises(UserError):
        run(small(*COMMON))
    home = run(small(*COMMON, "run.on_nonfinite=skip"))
    assert home.name == only(tmp_path).name and sorted(rows(home)) == [6, STEPS]


def test_an_entry_that_spoils_the_statistics_of_all_latents_is_named(
    small: Compose, poison: Callable[..., str]
) -> None:
    entry = poison("latents=per_channel")
    with pytest.raises(UserError, match=rf"images/\d\d\.png is not finite \({entry}\): .* --verify"):
        run(small(*COMMON, "latents=per_channel"))


# --- going back -------------------------------------------------------------------------------------------------------


def held_still(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Neither weights nor optimizer nor average move in these steps, whatever their gradients."""
    update, average, calls = WholeUpdate.__call__, StandardEma.update, itertools.count(1)

    def updated(self: WholeUpdate) -> torch.Tensor:
        if next(calls) not in steps:
            return update(self)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.ones(())

    monkeypatch.setattr(WholeUpdate, "__call__", updated)
    monkeypatch.setattr(StandardEma, "update", lambda self, step: None if step in steps else average(self, step))


def test_rewinding_goes_on_after_the_bad_step_with_the_weights_of_the_newest_checkpoint(
    small: Compose,
    poison: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A run that was killed after it went back ends like one that was not, and like one that stood still meanwhile."""
    poison()
    rewinds = [*COMMON, "run.log_every=1", "run.on_nonfinite=rewind", "ema.device=cpu"]
    home = run(small(*rewinds))
    assert "those of step 3 again" in capsys.readouterr().out and bad_steps(home) == [BAD]
    assert "train/loss" not in rows(home)[BAD] or math.isfinite(losses(home)[BAD])

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", dying(BAD))
        patch.setattr(session, "train", loop.train)
        with pytest.raises(Killed):
            run(small(*rewinds, "name=killed"))
    killed = run(small(*rewinds, "name=killed"))
    assert losses(killed) == losses(home) and same_weights(killed, home) and bad_steps(killed) == [BAD]

    discard_what_is_bad(small(*rewinds))
    held_still(monkeypatch, range(4, BAD + 1))
    oracle = run(small(*rewinds, "name=oracle"))
    assert same_weights(home, oracle)
    assert {s: x for s, x in losses(home).items() if s > BAD} == {s: x for s, x in losses(oracle).items() if s > BAD}


class Killed(BaseException):
    """Stands for kill -9: nothing is saved, nothing is told."""


def dying(at: int) -> Callable[..., int]:
    """The loop, killed after step `at`."""
    train = loop.train

    class Death(NoHook):
        def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
            if step == at:
                raise Killed

    def until(run: Any, parts: Any, **kwargs: Any) -> int:
        parts.hooks = [*parts.hooks, Death()]
        return train(run, parts, **kwargs)

    return until


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(small: Compose, poison: Callable[..., str]) -> None:
    poison()
    with pytest.raises(UserError, match=r"no checkpoint to go back to yet: lower run\.checkpoint_every"):
        run(small(*COMMON, "run.checkpoint_every=100", "run.on_nonfinite=rewind"))


# --- several processes ------------------------------------------------------------------------------------------------


def test_one_ranks_bad_entry_ends_all_and_is_left_out_by_all(
    small: Compose, poison: Callable[..., str], images: Path, tmp_path: Path, forks: None
) -> None:
    """The image of step BAD that is poisoned is the second rank's."""
    entry = poison("loss=uncertainty")
    choices = [*COMMON, "run.batch_size=1", "distributed=ddp", "loss=uncertainty"]

    def launched(*further: str) -> subprocess.CompletedProcess[str]:
        launcher = "-m torch.distributed.run --standalone --nproc-per-node=2 -m nai_xl.train".split()
        command = [sys.executable, *launcher, *SMALL, f"data.dir={images}", *choices, *further]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    stopped = launched()
    assert stopped.returncode and entry in stopped.stderr and "is not finite" in stopped.stderr, stopped.stderr
    done = launched("run.on_nonfinite=skip")
    assert done.returncode == 0, done.stderr
    home = only(tmp_path)
    assert bad_steps(home) == [BAD] and rows(home)[STEPS]["train/skipped_steps"] == 1
    newest = sorted((home / "checkpoints").iterdir())[-1]
    for part in ("unet", "ema", "objective", "meter"):
        assert all(tensor.isfinite().all() for tensor in load_file(newest / f"{part}.safetensors").values()), part


# --- causes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_rate_that_is_far_too_high_is_named_as_the_cause(small: Compose, log_every: int) -> None:
    with pytest.raises(UserError) as told:
        run(small(*COMMON, "optimizer.lr=1e10", f"run.log_every={log_every}"))
    assert re.search(
        r"(had been growing since step \d|weights have grown to).* lower optimizer\.lr \(1e\+10", str(told.value)
    )


def test_numbers_that_an_earlier_version_saved_do_not_fail_every_later_start(
    small: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """The meter that 0.2 has saved: rows of three columns, one loss of them not finite."""
    meter = Meter(1000, gather=lambda rows: rows)
    old = {
        "rows": [torch.tensor([[1.0, 5, 0], [math.nan, 6, 1]], dtype=torch.float64)],
        "norms": [torch.tensor([math.nan])],
    }
    meter.load_state_dict(old)
    assert "left out" in capsys.readouterr().err
    meter.add_grad_norm(torch.tensor([2.0]), 2)
    values = meter.read(lr=1)
    assert (values["train/loss"], values["train/grad_norm"]) == (1, 2)


ENGINES = ["fsdp2", *(["deepspeed_zero2", "deepspeed_zero3"] if importlib.util.find_spec("deepspeed") else [])]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_shards_goes_back_as_one_process_does(
    small: Compose, poison: Callable[..., str], engine: str
) -> None:
    poison()
    words = [*COMMON, "run.log_every=1", "run.on_nonfinite=rewind"]
    # in a process of its own: DeepSpeed leaves marks on the one that has loaded it
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(small(*words, f"distributed={engine}", "name=shards"),)
    )
    child.start()
    child.join(300)
    assert child.exitcode == 0
    (home,) = Path("outputs").glob("shards-*")
    alone = run(small(*words))
    assert bad_steps(home) == [BAD] and losses(home) == pytest.approx(losses(alone), rel=1e-4)
