"""sample_weights: weights of images, and by their tags."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.data import sample_weights
from nai_xl.data.index import Index
from nai_xl.data.rows import Item
from nai_xl.data.sample_weights import Tags, by_tag, equal, in_words, read_classes, write_tags
from nai_xl.errors import UserError

TAGS = st.sampled_from(["solo", "red_hair", "Red Hair", " blue eyes", "hat", "", "miku", "monet"])


def index(*captions: str) -> Index:
    return Index([Item(Path(f"{n}.png"), text, (64, 64), f"{n:064x}") for n, text in enumerate(captions)])


def by_hand(captions: list[str], kinds: dict[str, str], temperature: float) -> list[float]:
    """The docstring's words, image by image, with limits of 1/2 and 2."""
    separator = "," if any("," in text for text in captions) else " "
    tags = [{t.replace("_", " ").lower().strip() for t in text.split(separator)} - {""} for text in captions]
    images = Counter(tag for some in tags for tag in some)
    weights = [1.0] * len(captions)
    for kind in {kinds.get(tag, "general") for tag in images}:
        means = {
            n: float(np.mean([images[t] ** -temperature for t in mine]))
            for n, some in enumerate(tags)
            if (mine := [t for t in some if kinds.get(t, "general") == kind])
        }
        for n, value in means.items():
            weights[n] *= value / float(np.mean([*means.values()]))
    limited = [min(max(weight, 0.5), 2.0) for weight in weights]
    return [weight / float(np.mean(limited)) for weight in limited]


def test_by_default_every_image_counts_alike() -> None:
    assert torch.equal(equal(index("a", "b")), torch.ones(2))


@settings(max_examples=60)
@given(captions=st.lists(st.lists(TAGS, max_size=4).map(",".join), min_size=1, max_size=12),
       temperature=st.sampled_from([0.0, 0.5, 1.0]), block=st.integers(1, 5))  # fmt: skip
def test_weights_are_the_formula_and_have_mean_1(captions: list[str], temperature: float, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_weights, "BLOCK", block)
        patch.setattr(sample_weights, "read_classes", lambda path: {"miku": "character", "monet": "artist"})
        found = Tags(temperature, 0.5, 2.0, classes=Path("classes.csv"))(index(*captions))
    kinds = {"miku": "character", "monet": "artist"}
    assert found.dtype == torch.float32 and found.mean().item() == pytest.approx(1)
    assert found.tolist() == pytest.approx(by_hand(captions, kinds, temperature), rel=1e-5)


def test_where_no_caption_has_a_comma_words_are_tags() -> None:
    captions = ["a black image"] * 8 + ["a red image"]
    black, red = Tags()(index(*captions))[[0, 8]].tolist()
    assert red > black
    assert [row.tag for row in by_tag(index(*captions), Tags()(index(*captions)))] == ["a", "image", "black"]


def test_a_class_neither_lifts_nor_lowers_the_images_that_have_it() -> None:
    """Nine pictures by a common artist, one by a rare one, ten by none: the ten stay at the mean."""
    names = {"common": "artist", "rare": "artist"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_weights, "read_classes", lambda path: names)
        found = Tags(classes=Path("x"))(index(*["common, solo"] * 9, "rare, solo", *["solo, solo"] * 10))
    assert found[10:].tolist() == pytest.approx([1.0] * 10)
    assert found[:10].mean().item() == pytest.approx(1) and found[9] > 1 > found[0]


def test_classes_are_read_from_a_table_and_from_a_folder(tmp_path: Path) -> None:
    expected = {"hatsune miku": "character", "monet": "artist"}
    (tmp_path / "classes.csv").write_text("Hatsune_Miku,character\n\nmonet, artist\n", encoding="utf-8-sig")
    folder = tmp_path / "classes"
    folder.mkdir()
    (folder / "character.txt").write_text("hatsune miku\n\n")
    (folder / "artist.txt").write_text("Monet\n")
    assert read_classes(tmp_path / "classes.csv") == read_classes(folder) == expected


@pytest.mark.parametrize("content", [None, "", "monet\n", b"\xff\xfe,x\n"])
def test_classes_that_cannot_be_read_are_refused_with_the_key(content: str | bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "classes.csv"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"sample_weights\.classes="):
        Tags(classes=file)(index("a, b"))


def test_limits_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"sample_weights\.smallest=3"):
        Tags(smallest=3, largest=2)


def test_the_report_names_the_heaviest_and_the_lightest_tags(tmp_path: Path) -> None:
    captions = [f"common, tag {n % 12}" for n in range(36)] + ["common, rare"] * 2 + ["once"]
    weights = Tags()(index(*captions))
    rows = by_tag(index(*captions), weights)
    assert [rows[0].tag, rows[0].images] == ["rare", 2] and "once" not in [row.tag for row in rows]
    assert rows[0].weight == pytest.approx(weights[36:38].mean().item())
    words = in_words(weights, rows)
    assert "heaviest tags: rare" in words and words.endswith("(in 3)") and "lightest" in words
    write_tags(rows, tmp_path / "tags.csv")
    with (tmp_path / "tags.csv").open(newline="") as file:
        assert len([*csv.reader(file)]) == 1 + len(rows)


def test_without_captions_all_images_count_alike() -> None:
    assert Tags()(index("", "")).tolist() == [1.0, 1.0]
    assert in_words(torch.ones(2), by_tag(index("", ""), torch.ones(2))) == "1 to 1"
