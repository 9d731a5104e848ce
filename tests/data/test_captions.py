"""What a sample is trained with of its image's captions: a function of (seed, position), and of nothing else."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.data.captions import Captions, PlainCaptions, TagCaptions
from nai_xl.errors import UserError
from nai_xl.rng import draws

TAGS = st.lists(st.text("abc d", min_size=1).filter(str.strip), max_size=6)


def tags(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@given(TAGS, st.integers(0, 7), st.integers(0, 2**40), st.sampled_from([0.0, 0.4, 1.0]))
def test_kept_tags_stay_in_front_and_no_tag_is_invented(
    written: list[str], keep: int, position: int, rate: float
) -> None:
    captions, caption = TagCaptions(0.0, keep=keep, tag_dropout=rate), ", ".join(written)
    found = tags(captions.pick([caption], draws(0, position)))
    expected = tags(caption)
    assert found[:keep] == expected[:keep]
    assert not Counter(found) - Counter(expected)
    if rate == 0:
        assert Counter(found) == Counter(expected)
    if rate == 1:
        assert found == expected[:keep]
    assert captions.pick([caption], draws(0, position)) == ", ".join(found)


def test_every_order_of_the_tags_is_as_likely() -> None:
    captions = TagCaptions(0.0, keep=1)
    found = Counter(captions.pick(["first, a, b, c"], draws(3, position)) for position in range(6000))
    assert set(found) == {f"first, {', '.join(order)}" for order in permutations("abc")}
    chi_square = sum((count - 1000) ** 2 / 1000 for count in found.values())
    assert chi_square < 20.5  # 0.1 % of fair draws exceed it, with 5 degrees of freedom


def test_tags_are_dropped_independently_and_as_often_as_asked() -> None:
    captions = TagCaptions(0.0, shuffle=False, tag_dropout=0.3)
    kept = np.array([
        [tag in tags(captions.pick(["a, b, c"], draws(0, position))) for tag in "abc"] for position in range(10_000)
    ])  # fmt: skip
    assert kept.mean(axis=0) == pytest.approx([0.7] * 3, abs=0.02)
    assert np.abs(np.corrcoef(kept.T) - np.eye(3)).max() < 0.04


def test_a_tag_that_is_added_changes_nothing_of_the_others() -> None:
    captions = TagCaptions(0.0, tag_dropout=0.5)
    for position in range(50):
        few, more = (tags(captions.pick([text], draws(0, position))) for text in ("a, b, c, d", "a, x, b, c, d"))
        assert [tag for tag in more if tag != "x"] == few


def test_a_mark_tells_how_many_tags_are_kept() -> None:
    captions = TagCaptions(0.0, keep=1, keep_until="|||")
    found = {captions.pick(["one, two ||| a, b"], draws(0, position)) for position in range(40)}
    assert found == {"one, two, a, b", "one, two, b, a"}
    found = {captions.pick(["one, a, b"], draws(0, position)) for position in range(40)}
    assert found == {"one, a, b", "one, b, a"}


def test_tags_may_be_separated_otherwise() -> None:
    found = TagCaptions(0.0, shuffle=False, separator=" ; ").pick(["a,b;c;; d"], draws(0, 0))
    assert found == "a,b; c; d"


@pytest.mark.parametrize("make", [PlainCaptions, TagCaptions])
def test_the_same_samples_lose_their_caption_whatever_the_option(make: type) -> None:
    lost = [make(0.3).pick(["a, b"], draws(0, position)) == "" for position in range(500)]
    assert lost == [draws(0, position).uniform("caption dropout") < 0.3 for position in range(500)]


def test_each_of_several_captions_is_drawn_as_often_and_one_is_not_drawn_at_all() -> None:
    captions = PlainCaptions(0.0)
    found = Counter(captions.pick(["a", "b", "c"], draws(0, position)) for position in range(9000))
    assert all(abs(found[name] - 3000) < 200 for name in "abc")
    dropped = PlainCaptions(0.5)
    for position in range(100):
        one, two = (dropped.pick(several, draws(0, position)) for several in (["a"], ["a", "a"]))
        assert one == two


@pytest.mark.parametrize("captions", [
    PlainCaptions(0.3, prefix="photo of ", suffix="."),
    TagCaptions(0.3, shuffle=False, prefix="best quality, "),
], ids=["plain", "tags"])  # fmt: skip
@pytest.mark.parametrize("written", [(), ("",), ("a , b",), ("a, b", "c")])
def test_every_text_that_is_drawn_was_listed(captions: Captions, written: tuple[str, ...]) -> None:
    listed = captions.texts(written)
    assert listed is not None
    assert {captions.pick(written, draws(0, position)) for position in range(200)} == set(listed)


@pytest.mark.parametrize("captions", [TagCaptions(), TagCaptions(shuffle=False, tag_dropout=0.1)])
def test_texts_that_vary_cannot_be_listed(captions: TagCaptions) -> None:
    assert captions.texts(()) is captions.texts(("a, b",)) is None


@pytest.mark.parametrize(("setting", "value"), [("dropout", 1.1), ("tag_dropout", -0.1), ("separator", " ")])
def test_impossible_settings_are_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"captions\.{setting}="):
        TagCaptions(**{setting: value})  # type: ignore[arg-type]
