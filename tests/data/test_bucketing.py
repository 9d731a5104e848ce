"""Canvases and how images land on them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.data.bucketing import AspectBuckets, SquareBucket, aspect_buckets, cover
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket, Bucketing

TINY, SDXL = AspectBuckets(128, 32, crops=3, flip=True), AspectBuckets(1024, 64)
SIDES = st.integers(16, 9000)
few = settings(deadline=None, max_examples=150)


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


@few
@given(width=SIDES, height=SIDES)
def test_image_goes_to_the_bucket_nearest_in_log_aspect(width: int, height: int) -> None:
    for bucketing in (TINY, SDXL):
        chosen = bucketing.assign(width, height)
        distance = [abs(math.log(width * b.height / (height * b.width))) for b in bucketing.buckets]
        assert abs(math.log(width * chosen.height / (height * chosen.width))) <= min(distance) + 1e-9


@few
@given(width=SIDES, height=SIDES)
def test_crop_lies_inside_a_resize_that_just_covers_the_canvas(width: int, height: int) -> None:
    for bucketing in (TINY, SDXL, SquareBucket(256, crops=2)):
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
        (lambda: AspectBuckets(1024, step=0), r"bucketing\.step"),
        (lambda: AspectBuckets(16, step=32), r"bucketing\.resolution"),
        (lambda: SquareBucket(100), r"bucketing\.resolution"),
        (lambda: SquareBucket(128, crops=0), r"bucketing\.crops"),
    ],
)
def test_impossible_canvases_are_refused(make: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()  # type: ignore[operator]
