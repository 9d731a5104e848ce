"""What happens beside the training."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nai_xl.engine.hooks import Evaluate, KeepBest
from nai_xl.errors import UserError


class Faulty:
    """An evaluator with a bug."""

    every = 1

    def run(self, step: int, studio: Any) -> dict[str, float]:
        raise ValueError("not enough values to unpack")


def test_an_evaluators_bug_is_told_by_the_key_of_the_evaluator_with_its_place_and_cause() -> None:
    evaluate = Evaluate(
        {"mine": Faulty()}, None, SimpleNamespace(evaluates=True, lockstep=False, any=bool), nullcontext
    )
    line = Faulty.run.__code__.co_firstlineno + 1
    words = rf"^evals\.mine failed at step 1: ValueError: not enough values to unpack \(.*test_hooks\.py:{line}\)"
    with pytest.raises(UserError, match=words) as raised:
        evaluate(1, {}, last=False)
    assert isinstance(raised.value.__cause__, ValueError) and "'~evals.mine'" in str(raised.value)


def test_the_best_training_loss_is_asked_for_where_the_training_reports_alone() -> None:
    kept = []
    checkpoints = SimpleNamespace(keep_best=lambda step, value: kept.append((step, value)))
    save = SimpleNamespace(save=lambda step, values: None, checkpoints=checkpoints)
    strategy = SimpleNamespace(first=True, any=bool)
    best: Any = KeepBest(save, "train/loss", "lower", None, {}, strategy, None)  # type: ignore[arg-type]
    best(5, {"val/loss": 1.0}, last=False)  # an evaluator's turn
    best(10, {"train/loss": 0.5, "train/lr": 1e-4}, last=False)
    best(20, {"train/loss": 0.6, "train/lr": 1e-4}, last=False)
    assert kept == [(10, 0.5)]
