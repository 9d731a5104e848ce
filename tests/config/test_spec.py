"""What a run is built from: refused before any weight is read, and told with the key that mends it."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=-1"], r"^optimizer: Invalid learning rate: -1\.0$"),
        (["~ema"], r"^ema is missing; set ema=OPTION$"),
        (["~cache"], r"^cache is missing; set cache=OPTION$"),
        (["~tracker"], r"^tracker is missing; set tracker=OPTION$"),
        (["~objective"], r"^objective is missing; leave out '~objective'$"),
        (
            ["evals=[val_loss]", "evals.val_loss.timesteps=1001"],
            r"^evals\.val_loss\.timesteps=1001: must be at most 1000",
        ),
        (["evals=[color]", "schedule.base.timesteps=15"], r"^evals\.color\.steps=16: must be at most 15"),
    ],
)
def test_what_cannot_be_is_refused_when_the_spec_is_made(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Spec.of(config.compose(["sampling.steps=5", *overrides]))


def test_groups_of_which_several_are_chosen_may_be_empty() -> None:
    spec = Spec.of(config.compose(["memory=[]", "evals=[]"]))
    assert not spec.memory and not spec.evals


def test_what_is_completed_late_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **given: Any) -> None:
        raise ValueError("limit=2: too much")

    targets = (
        "adapter.full.full",
        "optimizer.lr.constant",
        "optimizer.ema.StandardEma",
        "tracker.jsonl.JsonlTracker",
        "engine.checkpoint.LocalCheckpoints",
    )
    for target in targets:
        monkeypatch.setattr(f"nai_xl.{target}", refuse)
    spec = Spec.of(config.compose(["tracker=jsonl"]))
    for key in ("adapter", "lr", "ema", "tracker", "checkpoint"):
        with pytest.raises(UserError, match=rf"^{key}\.limit=2: too much$"):
            getattr(spec, key)()


class Alone(MemoryAction):
    """An action that a run on this one process cannot have."""

    def refuse(self, *, grad_accum: int, precision: str, world: int) -> None:
        raise UserError(f"memory: alone does not go with {world} process and {precision}")


def test_every_action_may_refuse_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.memory.attention.Sdpa", Alone)
    with pytest.raises(UserError, match="alone does not go with 1 process and no"):
        Spec.of(config.compose(["memory=[sdpa]"])).start()


TASKS = """
    class Task:
        timesteps = 0

        def __init__(self, level: int = 0):
            if level > 1:
                raise ValueError(f"level={level}: must be at most 1")

    def asking(run):
        raise ValueError(f"seed={run.seed}: not this one")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spec]:
    (tmp_path / "task_of_mine.py").write_text(textwrap.dedent(TASKS))
    monkeypatch.syspath_prepend(tmp_path)

    def made(target: str, *overrides: str) -> Spec:
        cfg = config.compose(["evals=[]", f"task._target_=task_of_mine.{target}", "plugins=[task_of_mine]", *overrides])
        return Spec.of(cfg)

    return made


@pytest.mark.parametrize("partial", ["true", "false"])
def test_a_task_that_asks_nothing_of_the_config_is_built_and_may_refuse(own: Callable[..., Spec], partial: str) -> None:
    assert type(own("Task", f"task._partial_={partial}").task).__name__ == "Task"
    with pytest.raises(UserError, match=r"^task\.level=2: must be at most 1$"):
        own("Task", f"task._partial_={partial}", "+task.level=2")


def test_a_task_that_asks_may_refuse_too(own: Callable[..., Spec]) -> None:
    with pytest.raises(UserError, match=r"^task\.seed=3: not this one$"):
        own("asking", "run.seed=3")


def test_a_protocol_as_annotation_is_left_unchecked() -> None:
    config.check(config.compose(["+checkpoint.strategy=null"]))
