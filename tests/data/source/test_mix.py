"""data=mix: several sources as one; repeats, what is held out, and mistakes, as they are typed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from nai_xl import config
from nai_xl.data.index import Index
from nai_xl.data.source.folder import FolderSource
from nai_xl.data.source.gaussian import GaussianSource
from nai_xl.data.source.mix import MixSource
from nai_xl.data.source.shards import ShardsSource
from nai_xl.errors import UserError
from nai_xl.train import main
from tests.data.source import forms
from tests.data.source.test_shards import packed, picture


def contents(index: Index) -> Counter[str]:
    return Counter(item.content for item in index.items)


def many(folder: Path, first: int, count: int) -> FolderSource:
    folder.mkdir()
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(f"{number}")
    return FolderSource(folder)


@pytest.fixture
def two(tmp_path: Path) -> dict[str, FolderSource]:
    """100 images each, of which 20 are in both."""
    return {"one": many(tmp_path / "one", 0, 100), "two": many(tmp_path / "two", 80, 100)}


def test_whole_repeats_are_copies_and_parts_are_a_share_that_stays(two: dict[str, FolderSource]) -> None:
    plain = contents(MixSource({"two": two["two"]}).scan())
    half = contents(MixSource({"two": two["two"]}, {"two": 0.5}).scan())
    assert set(plain.values()) == set(half.values()) == {1} and 35 < half.total() < 65
    more = contents(MixSource({"two": two["two"]}, {"two": 2.5}).scan())
    assert more == plain + plain + half  # the same ones
    less = contents(MixSource({"two": two["two"]}, {"two": 0.3}).scan())
    assert less < half  # and fewer are some of them
    assert not set(contents(MixSource(two, {"two": 0}).scan())) & set(plain) - set(contents(two["one"].scan()))


def test_the_order_is_that_of_content_and_caption_whatever_the_sources_are_called(two: dict[str, FolderSource]) -> None:
    index = MixSource(two, {"one": 2}).scan()
    keys = [(item.content, item.captions) for item in index.items]
    assert keys == sorted(keys)
    renamed = MixSource({"z": two["two"], "a": two["one"]}, {"a": 2}).scan()
    assert [(item.content, item.captions) for item in renamed.items] == keys


def test_what_several_sources_have_is_said_once(two: dict[str, FolderSource]) -> None:
    assert list(MixSource(two, {"one": 2}).scan().remarks) == [
        "one: 100 images, each 2 times an epoch",
        "two: 100 images, each 1 times an epoch",
        "20 images are in several sources, and are trained on from each",
    ]


def test_what_one_source_holds_out_is_trained_on_from_none(two: dict[str, FolderSource]) -> None:
    held = FolderSource(two["one"].dir, held_out=0.3)
    index = MixSource({**two, "one": held}, {"one": 3, "two": 3}).scan()
    out = {item.content for item in index.held_out}
    assert out == {item.content for item in held.scan().held_out} and not out & set(contents(index))
    everything = {item.content for source in two.values() for item in source.scan().items}
    further = MixSource({**two, "one": held}, held_out=0.5).scan()
    assert {item.content for item in further.held_out} == {c for c in everything if int(c[:13], 16) < 0.5 * 16**13}


def test_limits_and_reasons_name_the_source(tmp_path: Path) -> None:
    many(tmp_path / "one", 0, 1)
    members = {"1.png": picture(5), "1.txt": b"", "2.png": picture(2, (9, 9)), "2.txt": b""}
    shard = packed(tmp_path / "s.tar", members)
    mix = MixSource({"a": FolderSource(tmp_path / "one"), "b": ShardsSource(files=str(shard))})
    index = mix.scan()
    assert [(str(s.path), s.reason) for s in index.skipped] == [
        (f"{shard}/2.png", "9x9 pixels; data.sources.b.min_side is 16")
    ]
    assert any("data.sources.b.blank_captions=skip" in remark for remark in index.remarks)
    bad = MixSource({"b": ShardsSource(files=str(shard), min_side=99)})
    with pytest.raises(UserError, match=r"^data\.sources\.b\.files=.*data\.sources\.b\.min_side is 99"):
        bad.scan()
    last = index.items[0].path
    assert [item.path for item in index.without({last: "gone"}).items] == [index.items[1].path]


def test_nothing_left_and_latents_without_pictures_are_told(two: dict[str, FolderSource]) -> None:
    with pytest.raises(UserError, match="nothing is left to train on"):
        MixSource(two, {"one": 0, "two": 0}).scan()
    with pytest.raises(UserError, match=r"data\.sources\.g: its images are made by itself"):
        MixSource({"g": GaussianSource(resolution=64, count=2)}).scan()


# --- as it is typed ---------------------------------------------------------------------------------------------------


def typed_mistake(*overrides: str) -> str:
    with pytest.raises((UserError, ConfigCompositionException)) as told:
        cfg = config.compose(["data=mix", *overrides])
        config.check(cfg)
        config.build(cfg.data)
    return str(told.value)


def test_sources_are_added_by_their_options(images: Path, tmp_path: Path) -> None:
    forms.as_shards(images, tmp_path / "shards")
    cfg = config.compose(
        ["data=mix", "+data@data.sources.photos=folder", f"data.sources.photos.dir={images}",
         "+data@data.sources.art=shards", f"data.sources.art.files='{tmp_path}/shards/{{0..1}}.tar'",
         "+data.repeats.art=2"]
    )  # fmt: skip
    config.check(cfg)
    assert len(config.build(cfg.data).scan().items) == 36
    other = config.compose(["data=mix", "+data@data.sources.photos=folder", f"data.sources.photos.dir={images}"])
    assert config.signature(cfg) != config.signature(other)


def test_the_yaml_of_the_docs_composes(tmp_path: Path) -> None:
    page = (config.conf_dir().parent / "docs" / "data_sources.md").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "both.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    mix = config.compose([f"hydra.searchpath=['file://{tmp_path}']", "data=both"]).data
    assert mix.sources.photos._target_.endswith("FolderSource") and mix.sources.photos.dir == "/data/photos"
    assert mix.sources.art._target_.endswith("ShardsSource") and mix.repeats == {"art": 3}


def test_mistakes_are_told_where_they_are(images: Path) -> None:
    photos = "+data@data.sources.photos=folder", f"data.sources.photos.dir={images}"
    assert "data.sources={}: there is none; add one with +data@data.sources.NAME=folder" in typed_mistake()
    assert "data.sources.photos.dir is missing" in typed_mistake(photos[0])
    assert "data.sources.photos.dir=/none: no such folder" in typed_mistake(photos[0], "data.sources.photos.dir=/none")
    assert "did you mean 'min_side'" in typed_mistake(*photos, "+data.sources.photos.min_sied=3")
    assert "data.sources.b: no source of images" in typed_mistake(*photos, "+data.sources.b.dir=x")
    assert "data.repeats.phots: no such source; there is photos" in typed_mistake(*photos, "+data.repeats.phots=2")
    assert "data.repeats={'photos': -1}: input should be" in typed_mistake(*photos, "+data.repeats.photos=-1")


def test_a_typo_in_a_source_is_told_by_the_command(typed: Callable[..., str], images: Path) -> None:
    photos = "+data@data.sources.photos=folder", f"data.sources.photos.dir={images}"
    assert "data.sources.photos.min_sied" in typed(
        main, "data=mix", *photos, "data.sources.photos.min_sied=3", status=1
    )
    assert "data=foldr: no such option; did you mean 'folder'?" in typed(
        main, "data=mix", "+data@data.sources.photos=foldr", status=1
    )
