"""What happens beside the training."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nai_xl.engine.hooks import Evaluate
from nai_xl.errors import UserError


class Faulty:
    """An evaluator with a bug."""

    every = 1

    def run(self, step: int, studio: Any) -> dict[str, float]:
        raise ValueError("not enough values to unpack")


def test_an_evaluators_bug_is_told_by_the_key_of_the_evaluator_with_its_place_and_cause() -> None:
    evaluate = Evaluate({"mine": Faulty()}, None, SimpleNamespace(evaluates=True, lockstep=False), nullcontext)
    line = Faulty.run.__code__.co_firstlineno + 1
    words = rf"^evals\.mine failed at step 1: ValueError: not enough values to unpack \(.*test_hooks\.py:{line}\)"
    with pytest.raises(UserError, match=words) as raised:
        evaluate(1, {}, last=False)
    assert isinstance(raised.value.__cause__, ValueError) and "'~evals.mine'" in str(raised.value)
