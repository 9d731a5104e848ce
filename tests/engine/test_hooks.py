"""What happens beside the training."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nai_xl.engine.hooks import Evaluate


class Faulty:
    """An evaluator with a bug."""

    every = 1

    def run(self, step: int, studio: Any) -> dict[str, float]:
        raise ValueError("not enough values to unpack")


def test_an_evaluators_bug_keeps_its_traceback() -> None:
    evaluate = Evaluate([Faulty()], None, SimpleNamespace(evaluates=True, whole=True), nullcontext)
    with pytest.raises(ValueError, match=r"^not enough values to unpack$"):
        evaluate(1, {}, last=False)
