"""Sets of points in time, as sorted and disjoint intervals, and where an event lies in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]  # of a Chrome trace
Interval = tuple[float, float]


def span(event: Event) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def holds(intervals: Sequence[Interval], event: Event) -> bool:
    """Whether the event's middle lies in one of these sorted, disjoint intervals."""
    middle = float(event["ts"]) + float(event["dur"]) / 2
    place = bisect_right(intervals, (middle, float("inf"))) - 1
    return place >= 0 and middle <= intervals[place][1]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as sorted, disjoint intervals."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def without(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The points of one of two sequences of sorted, disjoint intervals that are not in the other."""
    edges = [-float("inf"), *(edge for interval in other for edge in interval), float("inf")]
    return overlap(one, list(zip(edges[::2], edges[1::2], strict=True)))


def overlap(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The points in both of two sequences of sorted, disjoint intervals."""
    common: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            common.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return common
