"""The numbers of a comparison, for results.csv (a row for each metric and arm) and results.json."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.power import power
from nai_xl.compare.wording import answer

CSV_COLUMNS = (
    "metric arm baseline verdict mean baseline_mean difference percent low high p p_holm p_equal margin seeds_needed "
    "bootstrap_low bootstrap_high unpaired_half_width times_narrower times_narrower_seeds seeds items step images notes"
).split()


def tidy(found: Comparison, row: Row) -> dict[str, object]:
    """One row of results.csv, with None for what there is no number for."""
    e = row.effect
    low, high = e.bootstrap if e and e.bootstrap else (None, None)
    return {
        "metric": row.metric,
        "arm": row.arm,
        "baseline": found.baseline,
        "verdict": row.verdict,
        "mean": row.mean,
        "baseline_mean": row.baseline_mean,
        "difference": e and e.difference,
        "percent": row.percent,
        "low": e and e.low,
        "high": e and e.high,
        "p": e and e.p,
        "p_holm": row.p_holm,
        "p_equal": row.p_equal,
        "margin": row.margin,
        "seeds_needed": row.seeds_needed,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "unpaired_half_width": e and e.unpaired,
        "times_narrower": e and e.factor,
        "times_narrower_seeds": e and e.factor_seeds,
        "seeds": " ".join(map(str, row.seeds)),
        "items": e and e.items,
        "step": row.step,
        "images": row.images,
        "notes": "; ".join(row.notes),
    }


def as_json(found: Comparison) -> dict[str, Any]:
    """The content of results.json: all of the comparison except its curves."""
    return _finite(
        {
            "name": found.asked.name,
            "question": found.asked.question,
            "baseline": found.baseline,
            "answers": {metric: answer(found, metric) for metric in found.metrics},
            "arms": [
                {
                    "arm": arm.label,
                    "choices": dict(arm.choices),
                    "runs": {str(seed): run.name for seed, run in arm.runs.items()},
                    "failed": {str(run.seed): run.error for run in arm.failed},
                }
                for arm in found.arms
            ],
            "results": [{**tidy(found, row), "seeds": list(row.seeds), "notes": list(row.notes)} for row in found.rows],
            "power": [asdict(one) for one in power(found, found.asked.detect)],
            "contrasts": [asdict(one) for one in found.contrasts],
            "images_to_target": [asdict(target) for target in found.targets],
            "cost": [asdict(cost) for cost in found.costs],
            "differences": found.differences,
            "notes": list(found.notes),
        }
    )


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON does not have, such as infinity, as words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
