"""Today's statistic on the stored results of the lab pages: python experiments/recompute.py writes recomputed.csv.

The results were stored by 0.1 as intervals, not as tables of seeds and items, so the mean squares are taken back from
them: the interval and its degrees of freedom give what seeds and what items add to the variance, up to two solutions,
of which the one with the larger p is kept; the width of the bootstrap gives the residual, on which p hardly depends.
Errors cannot be compared by their ratio, which needs the single values. Equality is not asked, and neither are arms
with fewer than three seeds, or what a run that failed would have changed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from nai_xl.compare.statistics.crossed import LEVEL, Crossed, critical_t
from nai_xl.compare.statistics.paired import holm

HERE = Path(__file__).parent
BOTH_QUANTILES = 2 * 1.96  # of a bootstrap interval, in its standard deviations
COLUMNS = "page file metric arm seeds items verdict p p_holm recomputed_p recomputed_p_holm recomputed_verdict".split()


def mean_squares(row: Mapping[str, str]) -> list[Crossed]:
    """Those that have this row's interval and degrees of freedom: one, or two."""
    seeds, items = len(row["seeds"].split()), int(row["items"])
    half = (float(row["high"]) - float(row["low"])) / 2
    variance = (half / critical_t(float(row["df"]))) ** 2
    if items == 1:
        return [Crossed(seeds, 1, variance)]
    booted = ((float(row["bootstrap_high"]) - float(row["bootstrap_low"])) / BOTH_QUANTILES) ** 2
    found = []
    for share in shares_of_seeds(float(row["df"]), seeds, items):
        of_seeds, more_by_items = share * variance, (1 - share) * variance
        rest = booted - (seeds - 1) / seeds * of_seeds - (items - 1) / items * more_by_items
        of_both = max(0.0, rest / ((items - 1) / items * (1 + (seeds - 1) / seeds)))
        found.append(Crossed(seeds, items, of_seeds, more_by_items + of_both, of_both))
    return found


def shares_of_seeds(df: float, seeds: int, items: int) -> list[float]:
    """The shares x of the seeds in the variance with 1 / df = x^2 / (S - 1) + (1 - x)^2 / (I - 1)."""
    a, b, c = 1 / (seeds - 1) + 1 / (items - 1), -2 / (items - 1), 1 / (items - 1) - 1 / df
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return sorted({min(1.0, max(0.0, (-b + sign * root) / (2 * a))) for sign in (1, -1)})


def recomputed(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("p") and row.get("metric")]
    p = [max(squares.p(float(row["difference"])) for squares in mean_squares(row)) for row in rows]
    for row, one, adjusted in zip(rows, p, holm(p), strict=True):
        shown = adjusted < LEVEL and len(row["seeds"].split()) > 2
        yield {
            "page": path.parent.name, "file": path.name, "metric": row["metric"], "arm": row["arm"],
            "seeds": len(row["seeds"].split()), "items": int(row["items"]), "verdict": row["verdict"],
            "p": f"{float(row['p']):.2g}", "p_holm": f"{float(row['p_holm']):.2g}" if row["p_holm"] else "",
            "recomputed_p": f"{one:.2g}", "recomputed_p_holm": f"{adjusted:.2g}",
            "recomputed_verdict": verdict(row, shown),
        }  # fmt: skip


def verdict(row: Mapping[str, str], shown: bool) -> str:
    """The direction is the stored one; where 0.1 showed nothing and today something does, the sign is given."""
    if not shown:
        return "undecided"
    if row["verdict"] != "no difference shown":
        return row["verdict"]
    return "higher" if float(row["difference"]) > 0 else "lower"


def main() -> None:
    rows = [row for path in sorted(HERE.glob("*/results*.csv")) for row in recomputed(path)]
    with (HERE / "recomputed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    same = {"no difference shown": "undecided"}
    for row in rows:
        if same.get(str(row["verdict"]), row["verdict"]) != row["recomputed_verdict"]:
            print(", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{len(rows)} verdicts")


if __name__ == "__main__":
    main()
