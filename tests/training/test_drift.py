"""A run whose data have changed since it began."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from PIL import Image

from nai_xl.data.drift import changes, in_words, note
from nai_xl.data.index import Index
from nai_xl.data.source.folder import scan
from nai_xl.errors import UserError
from nai_xl.train import train
from nai_xl.training.drift import refuse_unlike

Compose = Callable[..., DictConfig]


def change(folder: Path) -> None:
    """One image added, one removed, one painted anew, one with another caption."""
    Image.new("RGB", (96, 96), "red").save(folder / "new.png")
    (folder / "new.txt").write_text("a red square")
    (folder / "00.png").unlink()
    Image.new("RGB", (96, 96), "blue").save(folder / "03.png")
    (folder / "06.txt").write_text("another caption")


WORDS = "1 added (new.png), 1 removed (00.png), 1 with another picture (03.png), 1 with another caption (06.png)"


def test_a_note_tells_what_has_happened_to_which_images(images: Path, tmp_path: Path) -> None:
    at = tmp_path / "note.arrow"
    assert changes(at, scan(images)) is None
    note(at, scan(images))
    assert changes(at, scan(images)) == []
    (images / "05.png").rename(images / "renamed.png")  # the same image
    (images / "05.txt").rename(images / "renamed.txt")
    assert changes(at, scan(images)) == []
    change(images)
    found = changes(at, scan(images))
    assert found is not None and in_words(found) == WORDS
    at.write_bytes(at.read_bytes()[:100])
    assert changes(at, scan(images)) is None


def test_without_names_the_counts_are_told(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.data.drift.NAMED", 3)
    note(tmp_path / "note.arrow", scan(images))
    change(images)
    found = changes(tmp_path / "note.arrow", scan(images))
    assert found is not None
    counts = {change.what: change.count for change in found}
    assert counts == {"added": 2, "removed": 2, "with another caption": 1}


def trained(cfg: DictConfig) -> Path:
    return train(cfg, {"model": "tiny"})


def test_a_run_goes_on_stops_or_begins_anew_when_its_data_have_changed(
    small: Compose, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = trained(small("run.max_images=4"))
    assert trained(small("run.max_images=4")) == home
    assert "the data have changed" not in capsys.readouterr().out
    change(images)
    trained(small("run.max_images=4"))
    said = capsys.readouterr().out
    assert "finished: this run has 2 steps" in said and f"the data have changed since: {WORDS}. The run is of" in said
    with pytest.raises(UserError, match=r"1 added \(new\.png\), .*data\.on_change=continue .*name=NAME begins a new"):
        trained(small("run.max_images=6"))
    assert trained(small("run.max_images=6", "data.on_change=continue")) == home
    said = capsys.readouterr().out
    assert WORDS in said and "continuing after 2" in said
    assert WORDS in (home / "data_changes.jsonl").read_text()
    assert trained(small("run.max_images=8")) == home  # these are its data now
    new = trained(small("run.max_images=4", "data.on_change=new"))
    assert new == home
    (images / "01.txt").write_text("yet another")
    new = trained(small("run.max_images=4", "data.on_change=new"))
    assert new != home and new.name.startswith(f"{home.name.rpartition('-')[0]}-")
    assert trained(small("run.max_images=4", "data.on_change=new")) == new


def test_ranks_that_see_other_data_than_each_other_are_told_on_every_rank(images: Path) -> None:
    class Two:
        """Strategy of one of two processes; the other has seen `other`."""

        def __init__(self, other: Index):
            self.other = other

        def gather_objects(self, rows: list[Any]) -> list[Any]:
            return [*rows, (self.other.fingerprint(), len(self.other.items))]

    before = scan(images)
    refuse_unlike(before, Two(scan(images)))  # type: ignore[arg-type]
    (images / "00.png").unlink()
    with pytest.raises(
        UserError, match=r"^data: .* \(process 0: 12, process 1: 11\); give every machine the same files"
    ):
        refuse_unlike(before, Two(scan(images)))  # type: ignore[arg-type]


def test_a_run_that_has_kept_no_note_says_what_it_did_before(small: Compose, images: Path) -> None:
    home = trained(small("run.max_images=4"))
    (home / "trained_on.arrow").unlink()
    change(images)
    with pytest.raises(UserError, match=r"the data have changed since .* began"):
        trained(small("run.max_images=6"))
    trained(small("run.max_images=6", "data.on_change=continue"))
    assert "has not noted its images" in (home / "data_changes.jsonl").read_text()
    assert (home / "trained_on.arrow").is_file()
