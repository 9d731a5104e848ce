"""Keys of latents by array operations, against the form for one image."""

from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl import config
from nai_xl.data.keys import latent_key, latent_keys, numbers_of, recipe
from nai_xl.data.loader import Placed
from nai_xl.data.placement_table import PlacementTable
from nai_xl.data.rows import Item, Rows
from nai_xl.interfaces import Bucket, Placement

SIDES = st.integers(0, 2**31 - 1)
PAIRS = st.tuples(SIDES, SIDES)
PLACES = st.builds(lambda b, r, c, f: Placement(Bucket(*b), r, c, f), PAIRS, PAIRS, PAIRS, st.booleans())
RECIPES = st.binary(min_size=16, max_size=16)


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=32, max_size=32), PLACES), min_size=1, max_size=5), RECIPES)
def test_all_at_once_are_the_same_as_one_by_one(rows: list[tuple[bytes, Placement]], made_by: bytes) -> None:
    contents = np.frombuffer(b"".join(content for content, _ in rows), np.uint8).reshape(-1, 32)
    places = np.array([numbers_of(place) for _, place in rows], np.int32)
    expected = [latent_key(content.hex(), place, made_by) for content, place in rows]
    assert [key.tobytes().hex() for key in latent_keys(contents, places, made_by)] == expected


@settings(deadline=None)
@given(PLACES, st.integers(0, 6), st.integers(1, 2**20), RECIPES)
def test_every_number_of_a_placement_changes_the_key(place: Placement, which: int, by: int, made_by: bytes) -> None:
    places = np.array([numbers_of(place)] * 2, np.int64)
    places[1, which] += by
    one, other = latent_keys(np.zeros((2, 32), np.uint8), places, made_by)
    assert (one[:8] != other[:8]).any() and (one[8:] != other[8:]).any()


def test_many_keys_differ_in_either_half_and_have_all_bits_evenly() -> None:
    """Of one content: small numbers that differ little, as crops of one picture do."""
    width, left, top = np.meshgrid(np.arange(50), np.arange(40), np.arange(50))
    places = np.zeros((100_000, 7), np.int32)
    places[:, 0], places[:, 4], places[:, 5] = width.ravel(), left.ravel(), top.ravel()
    keys = latent_keys(np.zeros((len(places), 32), np.uint8), places, recipe("test"))
    for half in keys.copy().view(np.uint64).T:
        assert len(np.unique(half)) == len(places)
    ones = np.unpackbits(keys, axis=1).mean(axis=0)
    assert abs(ones - 0.5).max() < 0.016  # ten deviations


def test_recipes_differ_by_every_part() -> None:
    assert len({recipe(*parts) for parts in (("a", 1), ("a", 2), ("a1",), (1, "a"))}) == 4


def test_the_table_has_every_placement_of_every_image_with_its_key() -> None:
    bucketing = config.build(config.compose(["bucketing=square", "bucketing.crops=3", "bucketing.flip=true"]).bucketing)
    draw = np.random.default_rng(0)
    items = [
        Item(Path(f"{n}.png"), "", (int(width), int(height)), draw.bytes(32).hex())
        for n, (width, height) in enumerate(draw.integers(40, 44, (50, 2)) * np.array([4, 7]))
    ]
    parts = [
        Placed(Rows.of(some), bucketing, partial(latent_key, made_by=b"x" * 16)) for some in (items[:30], items[30:])
    ]
    table = PlacementTable.of(parts)
    expected = [(item, ref) for placed in parts for item in placed.rows for ref in placed.of(item)]
    assert len(table) == len(expected) == sum(placed.total for placed in parts) > 100
    assert [table.job(row) for row in range(len(table))] == [(item, ref.placement) for item, ref in expected]
    keys = table.keys(b"x" * 16)
    assert [key.tobytes().hex() for key in keys] == [ref.key for _, ref in expected]
    assert table.sides(np.arange(len(table))).tolist() == [[128, 128]] * len(table)
    assert len(PlacementTable.of([]).keys(b"x" * 16)) == 0
