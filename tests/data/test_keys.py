"""Keys of latents by array operations, against the form for one image."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl import config
from nai_xl.data.keys import latent_key, latent_keys, mask_of, numbers_of, recipe
from nai_xl.data.latent_refs import LatentRefs, contents_of
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
    expected = [latent_key(content.hex(), mask_of(place, made_by)) for content, place in rows]
    assert [key.tobytes().hex() for key in latent_keys(contents, places, made_by)] == expected


@settings(deadline=None)
@given(PLACES, st.integers(0, 6), st.integers(1, 2**20), RECIPES)
def test_every_number_of_a_placement_changes_the_key(place: Placement, which: int, by: int, made_by: bytes) -> None:
    places = np.array([numbers_of(place)] * 2, np.int64)
    places[1, which] += by
    one, other = latent_keys(np.zeros((2, 32), np.uint8), places, made_by)
    assert (one[:8] != other[:8]).any() and (one[8:] != other[8:]).any()


def test_a_million_keys_differ_in_either_half_and_have_all_bits_evenly() -> None:
    """Of one content: small numbers that differ little, as crops of one picture do."""
    width, left, top = np.meshgrid(np.arange(100), np.arange(100), np.arange(100))
    places = np.zeros((1_000_000, 7), np.int32)
    places[:, 0], places[:, 4], places[:, 5] = width.ravel(), left.ravel(), top.ravel()
    keys = latent_keys(np.zeros((len(places), 32), np.uint8), places, recipe("test"))
    for half in keys.copy().view(np.uint64).T:
        assert len(np.unique(half)) == len(places)
    ones = np.unpackbits(keys, axis=1).mean(axis=0)
    assert abs(ones - 0.5).max() < 0.005  # ten deviations


def test_recipes_differ_by_every_part() -> None:
    assert len({recipe(*parts) for parts in (("a", 1), ("a", 2), ("a1",), (1, "a"))}) == 4


def test_rows_of_placements_are_those_of_the_bucketing_and_their_keys_those_of_the_table() -> None:
    bucketing = config.build(config.compose(["bucketing=square", "bucketing.crops=3", "bucketing.flip=true"]).bucketing)
    draw = np.random.default_rng(0)
    sizes = draw.integers(40, 44, (50, 2), dtype=np.int32) * np.array([4, 7], np.int32)
    contents = draw.integers(0, 256, (50, 32), dtype=np.uint8)
    refs = LatentRefs.of(contents, sizes, bucketing, recipe("x"))
    table = refs.table()
    assert len(refs) == 50 and refs.buckets == {Bucket(128, 128)}
    keys = table.keys()
    flat = [(number, ref) for number, row in enumerate(refs) for ref in row]
    assert [number for number, _ in flat] == table.owner.tolist()
    assert [ref.placement for _, ref in flat] == [table.every[place] for place in table.place]
    assert [ref.key for _, ref in flat] == [key.tobytes().hex() for key in keys]
    for number, row in enumerate(refs):
        assert [ref.placement for ref in row] == bucketing.placements(*map(int, sizes[number]))
    assert [ref.key for ref in refs[7:9][1]] == [ref.key for ref in refs[8]]


def test_contents_that_are_no_hash_have_one() -> None:
    class Thing:
        content = "mine 7"

    assert contents_of([Thing()])[0].tobytes() == hashlib.sha256(b"mine 7").digest()  # type: ignore[list-item]
