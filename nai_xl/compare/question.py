"""What a comparison asks, and the name of its report: a sweep's own question has the sweep's, any other one its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nai_xl.compare.statistics.spending import Plan


@dataclass(frozen=True)
class Question:
    """What a sweep asks: from the node `sweep` of its experiment."""

    name: str
    question: str = ""
    baseline: str = ""  # 'schedule=ztsnr,loss=minsnr'; empty: the first arm
    metrics: Sequence[str] = ()  # empty: all that evaluators measured
    equivalence: str = ""  # "2%", or in the metrics' units; empty: what the metrics declare
    detect: str = ""  # a difference such as "1%", of which the report says how many seeds it takes
    plan: Plan | None = None  # how many seeds, and after how many they are judged; None: those that are there, once

    @property
    def asked(self) -> list[object]:
        """All that makes it another question about the same runs."""
        return [sorted(part.strip() for part in self.baseline.split(",")), sorted(self.metrics), self.equivalence]

    def asking(self, other: Question, runs: Sequence[str] = ()) -> Question:
        """`other`, which a user asks in place of this one, with a name that is always the same for the same question.

        `runs`: which ones, where they are not simply those of the sweep.
        """
        if not runs and other.asked == self.asked:
            return replace(other, name=self.name)
        digest = hashlib.sha256(json.dumps([other.asked, sorted(runs)]).encode()).hexdigest()[:6]
        differs = {
            f"baseline {other.baseline}": other.baseline != self.baseline,
            f"by {', '.join(other.metrics)}": bool(other.metrics) and other.metrics != self.metrics,
        }
        told = "; ".join(words for words, so in differs.items() if so)
        question = f"{self.question} ({told})" if self.question and told else self.question
        return replace(other, name=f"{self.name}-{digest}", question=question)
