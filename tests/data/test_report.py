"""What a bucketing does to the images, told before training; and what its limits leave out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nai_xl.data.bucketing import AspectBuckets, MultiBuckets, SquareBucket
from nai_xl.data.epoch_plan import EpochPlan
from nai_xl.data.index import Index, Item
from nai_xl.data.report import enlarged_and_cut, report, unseen, within
from nai_xl.evals.canvas_figure import canvases

SIDES = st.tuples(st.integers(8, 5000), st.integers(8, 5000))
few = settings(deadline=None, max_examples=60)


def index(*sizes: tuple[int, int], held_out: int = 0) -> Index:
    items = [Item(Path(f"{n}.png"), f"{n}", size, f"{n:064x}") for n, size in enumerate(sizes)]
    return Index(items[held_out:], [], items[:held_out])


def array(*sizes: tuple[int, int]) -> np.ndarray:
    return np.array(sizes, np.int32)


@few
@given(size=SIDES)
def test_the_share_cut_away_is_what_the_placement_leaves_out(size: tuple[int, int]) -> None:
    """Of the resized picture, up to the rounding of its sides to whole pixels."""
    bucketing = AspectBuckets(1024, scheme="novelai")
    bucket, resized, _, _ = bucketing.placements(*size)[0]
    numbers, factor, cut = enlarged_and_cut(bucketing, array(size))
    assert bucketing.buckets[numbers[0]] == bucket
    assert factor[0] == pytest.approx(max(bucket.width / size[0], bucket.height / size[1]))
    kept = bucket.width * bucket.height / (resized[0] * resized[1])
    assert cut[0] == pytest.approx(1 - kept, abs=2 / min(resized))


def test_a_panorama_and_a_speck_are_told() -> None:
    sizes = array(*[(1024, 1024)] * 8, (6400, 100), (20, 20), (900, 900))
    rows = report(AspectBuckets(1024, scheme="novelai"), sizes).rows()
    assert rows["buckets"] == "10 in 1024x1024, 1 in 2048x512"
    assert rows["cut away"] == (
        "8.5% of a picture in the mean, 93.8% at most; more than half of 1: bucketing.max_cut=0.5 leaves such out"
    )
    assert rows["enlarged"] == (
        "3 of 11 images, up to 51.2 times; 2 more than twofold: bucketing.max_enlarge=2 leaves such out"
    )
    plain = report(SquareBucket(64), array((64, 64), (128, 128))).rows()
    assert plain["enlarged"] == "none" and "max_" not in plain["cut away"]


def test_what_is_beyond_a_limit_is_skipped_with_its_reason_and_held_out_images_too() -> None:
    images = index((20, 20), (1024, 1024), (6400, 100), (30, 40), (512, 512), held_out=1)
    kept = within(images, AspectBuckets(1024, scheme="novelai", max_enlarge=2, max_cut=0.5))
    assert [item.size for item in kept.items] == [(1024, 1024), (512, 512)] and not kept.held_out
    reasons = {skip.path.name: skip.reason for skip in kept.skipped}
    assert reasons == {
        "0.png": "would be enlarged 51.2 times; bucketing.max_enlarge=2",
        "2.png": "would be enlarged 5.12 times; bucketing.max_enlarge=2",
        "3.png": "would be enlarged 29.9 times; bucketing.max_enlarge=2",
    }
    (panorama,) = within(index((64_000, 1000)), AspectBuckets(1024, scheme="novelai", max_cut=0.5)).skipped
    assert panorama.reason == "would lose 93.8% of its area; bucketing.max_cut=0.5"
    assert within(images, AspectBuckets(1024)) is images


def test_canvases_are_counted_from_tall_to_wide_and_a_long_list_is_shortened() -> None:
    sizes = array(*[(int(1000 * 1.1**k), 1000) for k in range(-15, 16)], (1000, 1000))
    found = report(AspectBuckets(1024, scheme="novelai"), sizes)
    aspects = [bucket.width / bucket.height for bucket in found.buckets]
    assert aspects == sorted(aspects) and found.images == len(sizes) and found.counts.min() > 0
    assert found.rows()["buckets"].endswith(f", and {len(aspects) - 12} more")


@pytest.mark.parametrize("chunk", [8, 64])
def test_images_that_a_run_does_not_see_are_told_with_what_helps(chunk: int) -> None:
    plan = EpochPlan([np.arange(20), np.arange(20, 220)], seed=0, chunk=chunk)
    positions = 220 // chunk * chunk
    seen = {int(i) for first, items in zip(range(0, positions, chunk), _chunks(plan), strict=False) for i in items}
    ((name, words),) = unseen(plan, positions, merges=False)
    assert name == "not seen" and words.startswith(f"{220 - len(seen)} of 220 images")
    assert ("bucketing.merge_small=true" in words) == (chunk > 20)
    ((_, merged),) = unseen(plan, positions, merges=True)
    assert "merge_small" not in merged
    assert not list(unseen(plan, 10 * 220, merges=False))


def _chunks(plan: EpochPlan) -> list[np.ndarray]:
    return [row for epoch in range(2) for row in plan.epoch(epoch)]


@pytest.mark.parametrize("bucketing", [SquareBucket(64), MultiBuckets(1024)])
def test_the_figure_shows_every_canvas(bucketing: SquareBucket | MultiBuckets) -> None:
    """A bar of the histogram's colour for each, in a picture whose width grows with them."""
    random = np.random.default_rng(0)
    found = report(bucketing, random.integers(200, 3000, (500, 2)).astype(np.int32))
    picture = canvases(found, skipped=3)
    blue = (np.asarray(picture) == (0, 114, 178)).all(2)
    runs = np.count_nonzero(np.diff(blue[: picture.height * 2 // 3].sum(0) > 8) == 1)
    assert isinstance(picture, Image.Image) and picture.width > 600 and runs >= len(found.buckets)
