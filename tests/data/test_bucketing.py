"""Canvases and how images land on them."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nai_xl.data.bucketing import AspectBuckets, MultiBuckets, SdxlTable, SquareBucket, aspect_buckets, cover
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket, Bucketing

TINY, SDXL = AspectBuckets(128, 32, crops=3, flip=True), AspectBuckets(1024, 64)
SIDES = st.integers(16, 9000)
few = settings(deadline=None, max_examples=150)
PUBLISHED = AspectBuckets(1024, 64, scheme="novelai")
ALL: list[Bucketing] = [
    TINY,
    SDXL,
    PUBLISHED,
    SdxlTable(),
    SdxlTable(128, crops=2),
    SquareBucket(256, crops=2),
    MultiBuckets(1024, [512, 768, 1024], crops=2, flip=True),
    MultiBuckets(128, step=32),
    AspectBuckets(1000, 8, 6.0, scheme="novelai", min_side=400),
]


def nearest(buckets: Sequence[Bucket], width: int, height: int) -> Bucket:
    """The first of those that are nearest in log aspect."""
    wanted = math.log(width / height)
    return min(buckets, key=lambda b: abs(math.log(b.width / b.height) - wanted))


def array(sizes: Iterable[tuple[int, int]]) -> NDArray[np.int32]:
    return np.array(list(sizes), np.int32).reshape(-1, 2)


@few
@given(steps=st.integers(1, 20), step=st.sampled_from([8, 32, 64]), aspect=st.floats(1, 8))
def test_buckets_keep_within_the_area_and_grow_no_taller(steps: int, step: int, aspect: float) -> None:
    resolution = steps * step
    buckets = aspect_buckets("half", resolution, step, max_aspect=aspect)
    assert len(set(buckets)) == len(buckets)
    assert Bucket(resolution, resolution) in buckets
    for bucket in buckets:
        short, long = sorted(bucket)
        assert short % step == long % step == 0
        assert short * long <= resolution**2 < short * (long + step)
        assert long <= short * aspect
        assert Bucket(bucket.height, bucket.width) in buckets


def test_sdxl_buckets_are_the_known_ones() -> None:
    assert {(1024, 1024), (1152, 896), (832, 1216), (1344, 768), (640, 1600)} <= set(SDXL.buckets)
    assert all(max(b) <= 4 * min(b) for b in SDXL.buckets)
    assert [b.width / b.height for b in SDXL.buckets] == sorted(b.width / b.height for b in SDXL.buckets)


def test_the_published_buckets_of_1024_have_sides_from_512_to_2048() -> None:
    """As the scheme's published code makes them: widths from half to twice the edge, then with the roles swapped."""
    found = set()
    for width in range(512, 2049, 64):
        height = next(h for h in range(2048, 0, -64) if width * h <= 1024 * 1024)
        found |= {Bucket(width, height), Bucket(height, width)}
    assert set(PUBLISHED.buckets) == found and len(found) == 33
    assert len(SDXL.buckets) == 17 and set(SDXL.buckets) < found


def test_sides_and_aspects_of_the_published_buckets_can_be_limited() -> None:
    def made(**limits: float) -> list[Bucket]:
        return AspectBuckets(1024, scheme="novelai", **limits).buckets  # type: ignore[arg-type]

    assert [b for b in PUBLISHED.buckets if max(b) <= 2 * min(b)] == made(max_aspect=2)
    assert {side for b in made(min_side=640) for side in b} >= {640, 1600}
    assert all(min(b) >= 640 for b in made(min_side=640))
    assert max(side for b in made(max_side=1280) for side in b) == 1280
    assert Bucket(256, 4096) in made(min_side=256, max_side=4096, max_aspect=16)


def test_sdxls_table_has_40_canvases_of_about_a_megapixel() -> None:
    """Three rows of the paper's table, and what all of its rows have in common."""
    buckets = SdxlTable().buckets
    assert len(set(buckets)) == 40
    assert {(512, 2048), (704, 1344), (1216, 832), (2048, 512)} <= set(buckets)
    assert all(side % 64 == 0 and 512 <= side <= 2048 for b in buckets for side in b)
    assert all(0.9 * 2**20 < b.width * b.height <= 1.07 * 2**20 for b in buckets)
    assert [b for b in buckets if Bucket(b.height, b.width) not in buckets] == [(704, 1344)]
    assert SdxlTable(512).buckets == [Bucket(w // 2, h // 2) for w, h in buckets]


@few
@given(sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), max_size=20))
def test_image_goes_to_the_bucket_nearest_in_log_aspect(sizes: list[tuple[int, int]]) -> None:
    for bucketing in (TINY, SDXL, PUBLISHED, SdxlTable()):
        expected = [nearest(bucketing.buckets, *size) for size in sizes]
        assert [bucketing.assign(*size) for size in sizes] == expected
        assert [bucketing.buckets[n] for n in bucketing.buckets_of(array(sizes))] == expected


def test_images_between_two_canvases_go_where_they_went_one_by_one() -> None:
    """Aspects whose logarithm lies in the middle, where roundings decide."""
    for bucketing in (TINY, PUBLISHED, SdxlTable()):
        pairs = [(a, b) for a in bucketing.buckets for b in bucketing.buckets]
        sizes = [(a.width * b.width, a.height * b.height) for a, b in pairs]
        roots = [(math.isqrt(w), math.isqrt(h)) for w, h in sizes]  # aspect sqrt(a b), exact where both are squares
        found = bucketing.buckets_of(array(sizes + roots))
        assert [bucketing.buckets[n] for n in found] == [nearest(bucketing.buckets, *size) for size in sizes + roots]


@few
@given(sizes=st.lists(st.tuples(SIDES, SIDES), max_size=12))
def test_all_images_at_once_are_placed_as_one_by_one(sizes: list[tuple[int, int]]) -> None:
    for bucketing in ALL:
        places = bucketing.places(array(sizes))
        expected = [bucketing.placements(*size) for size in sizes]
        assert places.counts.tolist() == [len(some) for some in expected]
        rows = [[*p.bucket, *p.resized, *p.crop, int(p.flip)] for some in expected for p in some]
        assert places.rows.tolist() == rows and places.rows.dtype == np.int32


@few
@given(width=SIDES, height=SIDES)
def test_of_several_resolutions_an_image_gets_the_largest_that_does_not_enlarge_it(width: int, height: int) -> None:
    multi = MultiBuckets(1024, [768, 512, 1024])
    alone = [AspectBuckets(edge, scheme="novelai").assign(width, height) for edge in (1024, 768, 512)]
    fits = [bucket for bucket in alone if bucket.width <= width and bucket.height <= height]
    assert multi.assign(width, height) == (fits[0] if fits else alone[-1])


def test_a_resolution_with_the_canvases_of_another_adds_none() -> None:
    assert MultiBuckets(64, [64, 70], step=32).buckets == MultiBuckets(64, [64], step=32).buckets


def test_resolutions_are_by_default_half_three_quarters_and_all_in_whole_steps() -> None:
    squares = [[b.width for b in MultiBuckets(edge, step=step).buckets if b.width == b.height] for edge, step in
               ((1024, 64), (128, 32), (64, 16))]  # fmt: skip
    assert squares == [[512, 768, 1024], [64, 96, 128], [32, 48, 64]]


# --- small canvases ---------------------------------------------------------------------------------------------------


@few
@given(sizes=st.lists(st.tuples(st.integers(300, 3000), st.integers(300, 3000)), min_size=1, max_size=60),
       chunk=st.integers(1, 20), several=st.booleans())  # fmt: skip
def test_after_merging_every_canvas_has_a_chunk_of_images(
    sizes: list[tuple[int, int]], chunk: int, several: bool
) -> None:
    bucketing = (
        MultiBuckets(1024, merge_small=True)
        if several
        else AspectBuckets(1024, scheme="novelai", merge_small=True, crops=2)
    )
    merged = bucketing.merged(array(sizes), chunk)
    counts = np.bincount(merged.buckets_of(array(sizes)), minlength=len(merged.buckets))
    assert counts.min() >= chunk or len(counts) == 1
    assert set(merged.buckets) <= set(bucketing.buckets)
    if not several:  # an image whose canvas is left stays on it
        before = [bucketing.assign(*size) for size in sizes]
        after = [merged.assign(*size) for size in sizes]
        assert all(a == b for a, b in zip(after, before, strict=True) if b in merged.buckets)
        assert after == [nearest(merged.buckets, *size) for size in sizes]


def test_small_canvases_are_merged_into_the_nearest_and_only_if_asked() -> None:
    sizes = array([(1024, 1024)] * 8 + [(1216, 832)] * 8 + [(1152, 896)] * 3 + [(2048, 512)] * 2)
    assert SDXL.merged(sizes, 4) is SDXL
    merged = AspectBuckets(1024, merge_small=True).merged(sizes, 4)
    assert [b.name for b in merged.buckets] == ["1024x1024", "1216x832"]
    assert merged.assign(1152, 896) == (1216, 832) == merged.assign(2048, 512)
    assert merged.placements(1024, 1024) == SDXL.placements(1024, 1024)


@few
@given(width=SIDES, height=SIDES)
def test_crop_lies_inside_a_resize_that_just_covers_the_canvas(width: int, height: int) -> None:
    for bucketing in ALL:
        for bucket, resized, crop, _ in bucketing.placements(width, height):
            assert bucket == bucketing.assign(width, height)
            spare = [r - b for r, b in zip(resized, bucket, strict=True)]
            assert min(spare) == 0  # one axis fits exactly
            assert all(0 <= c <= s for c, s in zip(crop, spare, strict=True))
            exact = max(bucket.width / width, bucket.height / height)
            assert all(abs(r - side * exact) <= 1 for r, side in zip(resized, (width, height), strict=True))


@given(size=st.sampled_from([(128, 128), (256, 256), (160, 96), (320, 192)]))
def test_image_of_a_canvas_shape_is_not_cut_at_all(size: tuple[int, int]) -> None:
    bucket, resized, crop, _ = TINY.placements(*size)[0]
    assert resized == tuple(bucket)
    assert crop == (0, 0)


def test_three_crops_are_three_places_where_there_is_room() -> None:
    square = SquareBucket(64, crops=3)
    assert [p.crop for p in square.placements(128, 64)] == [(10, 0), (32, 0), (53, 0)]
    assert [p.crop for p in square.placements(64, 64)] == [(0, 0)]
    assert [p.crop for p in square.placements(64, 66)] == [(0, 0), (0, 1)]
    assert len(SquareBucket(64, crops=1).placements(128, 64)) == 1


def test_one_crop_is_the_centre() -> None:
    assert [p.crop for p in SquareBucket(64).placements(164, 64)] == [(50, 0)]


def test_time_ids_are_height_first_and_mirrored_with_the_picture() -> None:
    plain, mirrored = SquareBucket(64, crops=2, flip=True).placements(400, 200)[:2]
    assert (plain.flip, mirrored.flip) == (False, True)
    assert plain.crop == mirrored.crop == (16, 0)
    assert plain.time_ids((400, 200)) == [200, 400, 0, 16, 64, 64]
    assert mirrored.time_ids((400, 200)) == [200, 400, 0, 128 - 64 - 16, 64, 64]


def test_mirrored_left_is_where_the_cut_lies_in_the_mirrored_picture() -> None:
    """Cutting and mirroring must be mirroring and cutting at time_ids' left."""
    row = np.arange(128)
    for placement in SquareBucket(64, crops=3, flip=True).placements(128, 64):
        left = placement.crop[0]
        seen = row[left : left + 64][::-1] if placement.flip else row[left : left + 64]
        turned = row[::-1] if placement.flip else row
        told = int(placement.time_ids((128, 64))[3])
        np.testing.assert_array_equal(turned[told : told + 64], seen)


@few
@given(width=SIDES, height=SIDES)
def test_cover_never_falls_short(width: int, height: int) -> None:
    bucket = Bucket(832, 1216)
    resized = cover(width, height, bucket)
    assert resized[0] >= bucket.width
    assert resized[1] >= bucket.height


def test_square_bucketing_has_one_canvas() -> None:
    square: Bucketing = SquareBucket(128)
    assert {square.assign(w, h) for w, h in ((10, 900), (500, 500), (900, 10))} == {Bucket(128, 128)}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AspectBuckets(1024, step=12), "multiples of 8"),
        (lambda: AspectBuckets(64, step=32, min_side=2000), "no canvas"),
        (lambda: AspectBuckets(1024, step=0), r"bucketing\.step"),
        (lambda: AspectBuckets(16, step=32), r"bucketing\.resolution"),
        (lambda: SquareBucket(100), r"bucketing\.resolution"),
        (lambda: SdxlTable(64), r"bucketing\.resolution=1024, or bucketing=aspect"),
        (lambda: AspectBuckets(1024, scheme="novelai", min_side=1088), r"bucketing\.resolution"),
        (lambda: MultiBuckets(1024, [512, 16]), r"bucketing\.resolution"),
        (lambda: MultiBuckets(1024, step=0), r"bucketing\.step"),
        (lambda: SquareBucket(128, crops=0), r"bucketing\.crops"),
    ],
)
def test_impossible_canvases_are_refused(make: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()  # type: ignore[operator]
