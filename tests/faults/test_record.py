"""Damage in a run's record is named, kept aside, and does not spread."""

import json
from pathlib import Path

import pytest

from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, arm_so_far, read_arm, write_arm
from nai_xl.record.config import write_params
from nai_xl.record.items import items_path, read_items, write_items
from nai_xl.record.journal import Journal, metrics_of, outbox_of
from nai_xl.record.metrics import curves, last_step, lost_rows
from nai_xl.record.run_dir import RunDirectory
from nai_xl.tracker.jsonl import JsonlTracker

Told = pytest.CaptureFixture[str]


def reported(run: Path, steps: int, *, checked: bool = True) -> Path:
    """metrics.jsonl of so many steps; without checksums as earlier versions wrote it."""
    journal = metrics_of(run)
    for step in range(1, steps + 1):
        if checked:
            journal.append(step=step, time=1000 + step, **{"train/loss": 1 / step})
        else:
            with journal.path.open("a") as file:
                file.write(json.dumps({"step": step, "time": 1000 + step, "train/loss": 1 / step}) + "\n")
    return journal.path


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("wrong", [85, 0])
def test_a_changed_step_costs_that_row_alone(tmp_path: Path, capsys: Told, checked: bool, wrong: int) -> None:
    path = reported(tmp_path, 8, checked=checked)
    changed(path, '"step": 5,', f'"step": {wrong},')
    with JsonlTracker(tmp_path) as tracker:
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "metrics.jsonl: line 5 is damaged" in told
        tracker.log(8, {"train/loss": 3.0})  # reported before
        tracker.log(9, {"train/loss": 2.0})
    assert [*curves(tmp_path)["train/loss"]] == [1, 2, 3, 4, 6, 7, 8, 9] and last_step(tmp_path) == 9
    assert f'"step": {wrong},' in path.with_name("metrics.jsonl.damaged").read_text()
    JsonlTracker(tmp_path)
    assert capsys.readouterr().err == ""  # told once


def test_a_changed_last_row_keeps_no_later_one_out(tmp_path: Path) -> None:
    changed(reported(tmp_path, 5), '"step": 5,', '"step": 85,')
    with JsonlTracker(tmp_path) as tracker:
        tracker.log(5, {"train/loss": 2.0})
    assert last_step(tmp_path) == 5 and curves(tmp_path)["train/loss"][5] == 2.0


def test_every_flipped_bit_of_a_row_is_found(tmp_path: Path) -> None:
    written = reported(tmp_path, 3).read_bytes()
    lines = written.splitlines(keepends=True)
    begin, end = len(lines[0]), len(lines[0]) + len(lines[1])
    for place in range(begin, end):
        flipped = bytearray(written)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "metrics.jsonl").write_bytes(flipped)
        steps = [row["step"] for row in metrics_of(tmp_path).rows()]
        assert 2 not in steps and 1 in steps and (3 in steps or place == end - 1), place


def test_rows_of_an_earlier_version_are_read_and_added_to(tmp_path: Path) -> None:
    reported(tmp_path, 2, checked=False)
    with JsonlTracker(tmp_path) as tracker:
        tracker.log(3, {"train/loss": 2.0})
    assert [*curves(tmp_path)] == ["train/loss"] and [*curves(tmp_path)["train/loss"]] == [1, 2, 3]


def test_a_flipped_key_elsewhere_is_left_out(tmp_path: Path, capsys: Told) -> None:
    with JsonlTracker(tmp_path):
        pass
    changed(outbox_of(tmp_path).path, '"kind": "status", "status": "RUNNING"', '"kinf": "status", "status": "RUNNING"')
    JsonlTracker(tmp_path)
    assert "outbox.jsonl: line 1 is damaged" in capsys.readouterr().err
    write_items(tmp_path, "val/loss", 1, {"a": 1.0})
    write_items(tmp_path, "val/loss", 2, {"a": 2.0})
    changed(items_path(tmp_path, "val/loss"), '"step": 1', '"stfp": 1')
    assert read_items(tmp_path, "val/loss") == {2: {"a": 2.0}}
    with (tmp_path / "old.jsonl").open("w") as file:
        file.write('{"kinf": "status", "time": 1}\n{"kind": "tags", "time": 1, "tags": {}}\n')
    fits = outbox_of(tmp_path).fits
    assert [row["kind"] for row in Journal(tmp_path / "old.jsonl", fits).rows()] == ["tags"]


def test_a_reader_goes_on_where_a_row_ends_and_nowhere_else(tmp_path: Path) -> None:
    reported(tmp_path, 3)
    ends = [end for end, _ in metrics_of(tmp_path).after()]
    assert [row["step"] for _, row in metrics_of(tmp_path).after(ends[0])] == [2, 3]
    assert [row["step"] for _, row in metrics_of(tmp_path).after(ends[0] + 1)] == [1, 2, 3]


def test_lost_numbers_are_told(tmp_path: Path) -> None:
    path = reported(tmp_path, 10)
    assert lost_rows(tmp_path, 10, 1) == lost_rows(tmp_path, 12, 5) == []
    (line,) = lost_rows(tmp_path, 40, 10)
    assert "the numbers of steps 11 to 40 are lost" in line
    path.write_text("")
    assert "is empty: the numbers of steps 1 to 40" in lost_rows(tmp_path, 40, 10)[0]
    path.unlink()
    assert "is gone: the numbers of steps 1 to 40" in lost_rows(tmp_path, 40, 10)[0]
    (tmp_path / "config.yaml").write_text("run: [")  # damaged, and about to be written anew
    assert "is gone: the numbers of steps 1 to 40" in lost_rows(tmp_path, 40, 10)[0]


def test_an_empty_run_json_is_made_anew_if_the_data_are_known(tmp_path: Path, capsys: Told) -> None:
    home = RunDirectory(tmp_path)
    home.data.write_text("")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        home.claim_data("abc", 12)
    write_params(tmp_path, {"data_fingerprint": "abc"}, {})
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        home.claim_data("other", 12)
    home.claim_data("abc", 12)
    assert "run.json is damaged" in capsys.readouterr().err
    found = home.trained_on()
    assert found and found.data == "abc" and (tmp_path / "run.json.damaged").exists()


def test_a_damaged_arm_json_is_kept_aside(tmp_path: Path, capsys: Told) -> None:
    (tmp_path / "arm.json").write_text("{")
    assert arm_so_far(tmp_path) is None
    write_arm(tmp_path, Arm(seed=3))
    found = read_arm(tmp_path)
    assert found and found.seed == 3 and (tmp_path / "arm.json.damaged").read_text() == "{"
    assert capsys.readouterr().err.count("arm.json is damaged") == 1
