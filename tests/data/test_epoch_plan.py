"""The epoch plan: every image equally often, one bucket a chunk, the same from wherever one starts."""

import hashlib
from collections import Counter
from collections.abc import Hashable
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nai_xl.data.epoch_plan import EpochPlan, by_bucket, numbered
from nai_xl.data.loader import RankBatches

SIZES = st.lists(st.integers(1, 13), min_size=1, max_size=4)
ORDER = [[0, 9, 3, 6], [4, 7, 1, 4], [5, 8, 2, 5]]  # epoch 1 of buckets of 4, 3 and 3 images, seed 0, chunk 4
few = settings(deadline=None, max_examples=60)


def plan(sizes: list[int], seed: int = 0, chunk: int = 4) -> EpochPlan:
    """Buckets of these sizes, their items interleaved as in a real index."""
    names = sorted((i % size, b) for b, size in enumerate(sizes) for i in range(size))
    return EpochPlan(by_bucket(numbered([b for _, b in names])), seed, chunk)


def head(p: EpochPlan, chunks: int, position: int = 0) -> list[tuple[int, list[int]]]:
    return [(first, items.tolist()) for first, items in islice(p.from_position(position), chunks)]


def test_buckets_hold_every_item_once_in_order_of_first_appearance() -> None:
    found = by_bucket(numbered(["b", "a", "b", "c", "a", "b"]))
    assert [items.tolist() for items in found] == [[0, 2, 5], [1, 4], [3]]


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.text("ab", max_size=1), max_size=40))
def test_grouping_equals_its_plain_definition(buckets: list[Hashable]) -> None:
    expected: dict[Hashable, list[int]] = {}
    for number, bucket in enumerate(buckets):
        expected.setdefault(bucket, []).append(number)
    found = by_bucket(numbered(buckets))
    assert [items.tolist() for items in found] == list(expected.values())
    assert all(items.dtype == np.uint32 for items in found)


@few
@given(sizes=SIZES, seed=st.integers(0, 2**32), chunk=st.integers(1, 9), epochs=st.integers(1, 7))
def test_after_any_epoch_images_of_a_bucket_differ_by_one_view_at_most_and_none_is_dropped(
    sizes: list[int], seed: int, chunk: int, epochs: int
) -> None:
    p = plan(sizes, seed, chunk)
    seen = Counter(int(i) for epoch in range(epochs) for i in p.epoch(epoch).flatten())
    for items in p.buckets:
        counts = [seen[int(i)] for i in items]
        assert max(counts) - min(counts) <= 1
        assert 0 <= epochs * len(items) - sum(counts) < chunk  # what waits for the next epoch is less than a chunk


@few
@given(sizes=SIZES, seed=st.integers(0, 99), chunk=st.integers(1, 9), epoch=st.integers(0, 50))
def test_every_chunk_is_of_one_bucket_and_an_epoch_has_the_chunks_it_says(
    sizes: list[int], seed: int, chunk: int, epoch: int
) -> None:
    p = plan(sizes, seed, chunk)
    home = {int(i): b for b, items in enumerate(p.buckets) for i in items}
    rows = p.epoch(epoch)
    assert rows.shape == (p.chunks_before(epoch + 1) - p.chunks_before(epoch), chunk)
    assert all(len({home[int(i)] for i in row}) == 1 for row in rows)


@few
@given(sizes=SIZES, seed=st.integers(0, 99), chunk=st.integers(1, 9), start=st.integers(0, 80))
def test_starting_at_any_chunk_continues_the_run_from_there(
    sizes: list[int], seed: int, chunk: int, start: int
) -> None:
    whole = head(plan(sizes, seed, chunk), start + 12)
    assert head(plan(sizes, seed, chunk), 12, position=start * chunk) == whole[start:]
    assert [first for first, _ in whole] == list(range(0, len(whole) * chunk, chunk))


@few
@given(sizes=SIZES, seed=st.integers(0, 99), chunk=st.integers(1, 9))
def test_plan_is_its_epochs_one_after_the_other(sizes: list[int], seed: int, chunk: int) -> None:
    p = plan(sizes, seed, chunk)
    rows = [row.tolist() for epoch in range(4) for row in p.epoch(epoch)]
    assert [items for _, items in head(p, len(rows))] == rows


@few
@given(count=st.integers(12, 60), seed=st.integers(0, 2**32), chunk=st.integers(1, 4))
def test_order_changes_with_the_epoch_and_with_the_seed(count: int, seed: int, chunk: int) -> None:
    assume(count % chunk == 0)
    first, second = (plan([count], seed, chunk).epoch(e).flatten().tolist() for e in (0, 1))
    other = plan([count], seed + 1, chunk).epoch(0).flatten().tolist()
    assert sorted(first) == sorted(second) == sorted(other) == list(range(count))
    assert first != second
    assert first != other


def test_the_order_is_that_of_every_version_before() -> None:
    """Whoever changes it makes every run that there is another one."""
    assert plan([4, 3, 3]).epoch(1).tolist() == ORDER
    p = EpochPlan(by_bucket(np.array([(i * i) % 7 for i in range(1000)])), 20240923, 16)
    whole = hashlib.sha256(b"".join(p.epoch(e).astype(np.int64).tobytes() for e in (0, 1, 2, 57)))
    assert whole.hexdigest()[:16] == "8ffbc7d64e4b4da9"


@few
@given(sizes=SIZES, seed=st.integers(0, 99), worlds=st.permutations([1, 2, 4, 8]), size=st.integers(1, 2),
       start=st.integers(0, 6))  # fmt: skip
def test_at_equal_chunk_any_number_of_processes_trains_the_same_samples_in_the_same_order(
    sizes: list[int], seed: int, worlds: list[int], size: int, start: int
) -> None:
    """16 images a chunk, from any micro-batch of 16 on: all ranks together, in the order of positions."""

    def trained(world: int, batch_size: int) -> list[tuple[int, int]]:
        p = plan(sizes, seed, chunk=16)
        ranks = [RankBatches(p, start=16 * start, batch_size=batch_size, rank=r, world=world) for r in range(world)]
        rounds = zip(*ranks, strict=True)
        return [pair for some in islice(rounds, 48 // (batch_size * world)) for rank in some for pair in rank]

    assert trained(worlds[0], size) == trained(worlds[1], 1) == trained(1, 16)


@few
@given(sizes=SIZES, seed=st.integers(0, 99), chunk=st.integers(1, 9), chunks=st.integers(0, 30))
def test_images_that_a_run_sees_are_counted_without_running(
    sizes: list[int], seed: int, chunk: int, chunks: int
) -> None:
    p = plan(sizes, seed, chunk)
    seen = {i for _, items in head(p, chunks) for i in items}
    assert p.seen(chunks * chunk).tolist() == [len(seen & {*items.tolist()}) for items in p.buckets]


def test_chunks_of_different_buckets_are_mixed() -> None:
    p = plan([40, 40], chunk=4)
    homes = [0 if set(row) <= set(p.buckets[0]) else 1 for row in p.epoch(0)]
    assert homes not in ([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)
    assert p.epoch(1).tolist() != p.epoch(0).tolist()


def test_buckets_of_equal_size_are_shuffled_differently() -> None:
    p = EpochPlan([np.arange(20), np.arange(20, 40)], seed=0, chunk=20)
    first, second = sorted(p.epoch(0).tolist(), key=min)
    assert first != [item - 20 for item in second]


def test_all_orders_of_three_images_come_up() -> None:
    orders = Counter(tuple(plan([3], seed, 3).epoch(0)[0]) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 60  # 100 each on average


def test_bucket_smaller_than_a_chunk_is_still_trained() -> None:
    p = plan([2, 9], chunk=8)
    seen = Counter(int(i) for _, items in head(p, 60) for i in items)
    assert len(seen) == 11
    assert max(seen.values()) - min(seen.values()) <= 9  # 2 images x 4 views are one chunk
    assert all(seen[int(i)] >= 1 for i in p.buckets[0])


def test_position_inside_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="position 5"):
        next(plan([8]).from_position(5))


def test_far_positions_are_found_without_walking_there() -> None:
    p = EpochPlan([np.arange(1000), np.arange(1000, 1007)], seed=0, chunk=10)
    (first, items), (second, _) = islice(p.from_position(10**9), 2)
    assert (first, second) == (10**9, 10**9 + 10)
    assert len(items) == 10
