"""A signal means: finish the step, save, exit with 75. The same command goes on as if nothing had happened."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from nai_xl.engine import encode
from nai_xl.engine.meter import Meter
from nai_xl.engine.stop import Stop
from nai_xl.errors import Stopped
from nai_xl.evals.sample_grid import SampleGrid
from nai_xl.record.arm import read_arm
from nai_xl.train import main, train
from tests.conftest import SMALL
from tests.test_train import losses, same_weights

ORDERLY = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Each test leaves the handlers as they were. SIGHUP is as a terminal gives it, however the tests were started."""
    before = {number: signal.getsignal(number) for number in ORDERLY}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def once(call: Callable[..., Any], count: int, *numbers: int) -> Callable[..., Any]:
    """`call`, which sends the signals to this process when it is called for the `count`-th time."""
    calls = 0

    def calling(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            for number in numbers:
                send(number)
        return call(*args, **kwargs)

    return calling


LENGTH = ("run.max_images=10",)  # five steps, and an evaluation at the end


def whole(small: Callable[..., DictConfig], tmp_path: Path, name: str = "whole", *overrides: str) -> Path:
    return train(small(*LENGTH, *overrides, f"output_dir={tmp_path / name}"), {})


def test_each_signal_ends_the_step_saves_and_exits_with_75_and_the_same_command_goes_on(
    small: Callable[..., DictConfig],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: Callable[..., str],
) -> None:
    command = [*SMALL, f"data.dir={images}", *LENGTH, "output_dir=stopped"]
    expected = whole(small, tmp_path)
    for step, number in enumerate(ORDERLY, start=1):
        signal.signal(number, signal.SIG_DFL)  # the command before this one, whose process ends, ignores further ones
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "add", once(Meter.add, 1, number))  # in the middle of the step
            typed(main, *command, status=75)
        (home,) = (tmp_path / "stopped").iterdir()
        arm = read_arm(home)
        assert arm and (arm.status, arm.steps) == ("STOPPED", step)
        assert sorted(home.glob("checkpoints/step_*"))[-1].name == f"step_{step:08d}"
    typed(main, *command)
    assert losses(home) == losses(expected) and same_weights(home, expected)


def test_a_second_ctrl_c_ends_the_run_within_the_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Meter, "add", once(Meter.add, 2, signal.SIGINT, signal.SIGINT))
    typed(main, *SMALL, f"data.dir={images}", *LENGTH, status=130)
    (home,) = (tmp_path / "outputs").iterdir()
    assert not list(home.glob("checkpoints/step_*")) and list(losses(home)) == [1]
    arm = read_arm(home)
    assert arm and arm.status == "STOPPED"


def test_a_sighup_that_was_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with Stop() as stop:
        send(signal.SIGHUP)
        assert not stop.asked
        with pytest.raises(Stopped):
            send(signal.SIGUSR1)


def test_a_queue_that_sends_sigusr2_gets_its_turn_when_the_run_has_saved(
    small: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As submitit does: its handler puts the job back into the queue and ends the process."""
    found: list[list[str]] = []

    def queue_again(number: int, frame: object) -> None:
        found.append([path.name for path in tmp_path.glob("whole/*/checkpoints/*")])

    before = signal.signal(signal.SIGUSR2, queue_again)
    try:
        monkeypatch.setattr(Meter, "add", once(Meter.add, 2, signal.SIGUSR2))
        with pytest.raises(Stopped):
            whole(small, tmp_path)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found == [["step_00000002"]]


def test_encoding_is_left_at_once_and_what_is_encoded_is_kept(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded: list[int] = []

    def counted(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        if len(encoded) == 2:
            send(signal.SIGTERM)
        return encode_pixels(vae, pixels)

    encode_pixels = encode.encode_pixels
    monkeypatch.setattr(encode, "encode_pixels", counted)
    cfg = small("run.max_images=2", f"cache.dir={tmp_path / 'cache'}")
    with pytest.raises(Stopped):
        train(cfg, {})
    assert len(encoded) == 2
    train(cfg, {})
    assert len(encoded) == 4  # three buckets: the first was kept, and the second was not whole


def test_an_evaluation_is_left_before_its_next_pass_with_the_trained_weights_back(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not within the swap of weights and averages, which would leave a mixture of both."""
    expected = whole(small, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SampleGrid, "run", once(SampleGrid.run, 1, signal.SIGUSR1))
        with pytest.raises(Stopped):
            whole(small, tmp_path, "left", "evals.sample_grid.every=3")
    (home,) = (tmp_path / "left").iterdir()
    assert [path.name for path in home.glob("checkpoints/step_*")] == ["step_00000003"]
    assert not list(home.glob("samples/*"))
    whole(small, tmp_path, "left", "evals.sample_grid.every=3")
    assert same_weights(home, expected)


def test_an_evaluation_that_is_left_at_the_last_step_delivers_nothing_yet(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SampleGrid, "run", once(SampleGrid.run, 1, signal.SIGTERM))
        with pytest.raises(Stopped):
            whole(small, tmp_path)
    (home,) = (tmp_path / "whole").iterdir()
    assert not (home / "pipeline").exists() and (home / "checkpoints/step_00000005").is_dir()
    whole(small, tmp_path)
    assert (home / "pipeline").is_dir()


class Ranks:
    """The strategies of several ranks that train in lockstep: what one asks is answered when all have asked."""

    def __init__(self, world: int):
        self.world, self.rounds = world, []

    def of(self, rank: int) -> Any:
        asked = 0

        def ask(flag: bool) -> Callable[[], bool]:
            nonlocal asked
            number, asked = asked, asked + 1
            if len(self.rounds) <= number:
                self.rounds.append([])
            self.rounds[number].append(flag)
            return lambda: len(self.rounds[number]) == self.world and any(self.rounds[number])

        return SimpleNamespace(world=self.world, lockstep=True, ask=ask)


def test_ranks_end_after_the_same_step_although_one_alone_was_asked() -> None:
    ranks = Ranks(3)
    stops, strategies = [Stop() for _ in range(3)], [ranks.of(rank) for rank in range(3)]
    steps = 0
    while True:
        due = [stop.due(strategy) for stop, strategy in zip(stops, strategies, strict=True)]
        assert len(set(due)) == 1
        if due[0]:
            break
        steps += 1
        stops[1].asked = stops[1].asked or steps == 4  # a signal during the fourth step
    assert steps == 5  # the fourth, and the one that tells the others


def test_a_rank_that_evaluates_a_shard_leaves_with_the_others() -> None:
    """All ranks run each pass together: one that left alone would leave the others inside it."""
    ranks, module = Ranks(2), nn.Linear(1, 1)
    stop, other = Stop(), ranks.of(1)
    with stop.between_passes(module, ranks.of(0)):
        for flag in (False, False):
            other.ask(flag)
            module(torch.ones(1))
        other.ask(True)
        with pytest.raises(Stopped):
            module(torch.ones(1))
    module(torch.ones(1))
