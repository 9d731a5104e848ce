"""Images held out of training: by their content alone."""

import hashlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.data.index import Index
from nai_xl.data.rows import Item
from nai_xl.data.source.folder import FolderSource
from nai_xl.errors import UserError

hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
item = st.builds(Item, st.just(Path("a.png")), st.text(max_size=3), st.just((8, 8)), hashes)
items = st.lists(item, min_size=2, max_size=30)


@given(items, st.floats(0, 0.99))
def test_every_image_is_either_trained_on_or_held_out(given: list[Item], share: float) -> None:
    expected = [item for item in given if int(item.content[:13], 16) / 16**13 < share]
    try:
        index = Index(given).hold_out(share)
    except UserError:
        assert len(expected) == len(given)
        return
    assert list(index.held_out) == expected
    assert sorted([*index.items, *index.held_out], key=repr) == sorted(given, key=repr)
    assert not {item.content for item in index.items} & {item.content for item in index.held_out}


def test_about_the_share_is_held_out_and_others_do_not_matter() -> None:
    def item(number: int) -> Item:
        return Item(Path(f"{number}.png"), "", (8, 8), hashlib.sha256(str(number).encode()).hexdigest())

    many, few = [item(n) for n in range(2000)], [item(n) for n in range(500)]
    held = Index(many).hold_out(0.1).held_out
    assert len(held) == pytest.approx(200, abs=60)  # 4.5 standard deviations
    assert [i for i in held if i in few] == [*Index(few).hold_out(0.1).held_out]
    assert {i.content for i in Index(many).hold_out(0.05).held_out} < {i.content for i in held}


def test_a_folder_elsewhere_under_other_names_is_split_alike(images: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for path in images.glob("*"):
        shutil.copy(path, tmp_path / "copy" / f"x{path.name}")
    one, two = (FolderSource(folder, held_out=0.5).scan() for folder in (images, tmp_path / "copy"))
    assert 0 < len(one.held_out) < 12
    assert [i.content for i in one.held_out] == [i.content for i in two.held_out]
    assert one.fingerprint() == two.fingerprint() != FolderSource(images).scan().fingerprint()


def test_unusable_images_leave_both_parts(images: Path) -> None:
    index = FolderSource(images, held_out=0.5).scan()
    kept = index.without({index.items[0].path: "spoilt", index.held_out[0].path: "spoilt too"})
    assert [*kept.items] == [*index.items[1:]] and [*kept.held_out] == [*index.held_out[1:]]
    assert [skip.reason for skip in kept.skipped] == ["spoilt", "spoilt too"]


def test_holding_out_everything_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"data\.held_out"):
        FolderSource(images, held_out=0.999999).scan()
