"""python benchmarks/bucketing.py: how much of a picture each bucketing cuts away, and what its plan leaves unseen.

Sizes are drawn, since no data set is shipped: six in ten have one of the aspects that cameras, screens and paper have,
the others are spread log-normally; the longer side is 1600 pixels in the median.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.bucketing import AspectBuckets, MultiBuckets, SdxlTable
from nai_xl.data.epoch_plan import EpochPlan, by_bucket
from nai_xl.data.report import report
from nai_xl.interfaces import Bucketing

USUAL = (1 / 1, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9, 2**-0.5)
BUCKETINGS: dict[str, Bucketing] = {
    "aspect, scheme=half": AspectBuckets(1024),
    "aspect": AspectBuckets(1024, scheme="novelai"),
    "sdxl_table": SdxlTable(1024),
    "multi": MultiBuckets(1024),
}


def sizes(count: int, usual: float, seed: int = 0) -> NDArray[np.int32]:
    """[count,2] widths and heights; a share of `usual` aspects."""
    draw = np.random.default_rng(seed)
    long = np.exp(draw.normal(np.log(1600), 0.4, count))
    spread = np.exp(draw.normal(0, 0.45, count))
    aspect = np.where(draw.random(count) < usual, draw.choice(USUAL, count), spread)
    both = np.stack([long * np.minimum(aspect, 1), long / np.maximum(aspect, 1)], axis=1)
    return both.round().clip(64).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    args = parser.parse_args()
    for usual in (0.6, 0.0):
        drawn = sizes(args.count, usual)
        before = canvases(BUCKETINGS["aspect, scheme=half"], drawn)
        print(f"\n{usual:.0%} of usual aspects | canvases | cut away | other canvas than scheme=half | enlarged")
        for name, bucketing in BUCKETINGS.items():
            found = report(bucketing, drawn)
            moved = (np.array(bucketing.buckets)[bucketing.buckets_of(drawn)] != before).any(1).mean()
            print(
                f"{name} | {len(bucketing.buckets)} | {found.cut:.2%} | {moved:.1%} | {found.enlarged / args.count:.1%}"
            )
    print("\nnot seen in one epoch | 200 images | 1,000 | 10,000")
    for chunk in (64, 512):
        for merges in (False, True):
            told = [f"{_unseen(sizes(count, 0.6), chunk, merges):.0%}" for count in (200, 1000, 10_000)]
            print(f"chunk {chunk}{', merge_small' if merges else ''} | {' | '.join(told)}")


def canvases(bucketing: Bucketing, drawn: NDArray[np.int32]) -> NDArray[np.int64]:
    """[N,2]."""
    return np.array(bucketing.buckets)[bucketing.buckets_of(drawn)]


def _unseen(drawn: NDArray[np.int32], chunk: int, merges: bool) -> float:
    bucketing = AspectBuckets(1024, scheme="novelai", merge_small=merges).merged(drawn, chunk)
    plan = EpochPlan(by_bucket(bucketing.buckets_of(drawn)), 0, chunk)
    return 1 - plan.seen(-(-len(drawn) // chunk) * chunk).sum() / len(drawn)


if __name__ == "__main__":
    main()
