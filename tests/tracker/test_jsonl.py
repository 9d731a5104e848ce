"""metrics.jsonl: every step once, however often a run was cut short."""

import json
from pathlib import Path

import pytest
from PIL import Image

from nai_xl.record.journal import note_end
from nai_xl.tracker.jsonl import JsonlTracker


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in JsonlTracker(folder).metrics.rows()]


def log(folder: Path, *numbers: int) -> None:
    with JsonlTracker(folder) as tracker:
        for step in numbers:
            tracker.log(step, {"train/loss": step / 10})


def test_reports_are_kept_with_their_values(tmp_path: Path) -> None:
    log(tmp_path, 1, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 0.1), (2, 0.2)]


def test_run_without_reports_has_no_rows(tmp_path: Path) -> None:
    assert steps(tmp_path) == []


def test_resumed_run_repeats_no_step_it_has_reported(tmp_path: Path) -> None:
    log(tmp_path, 10, 20, 30)
    log(tmp_path, 20, 30, 40)  # resumed from the checkpoint at step 10
    assert steps(tmp_path) == [10, 20, 30, 40]


@pytest.mark.parametrize("kept", [1, 5, 20])
def test_line_torn_by_a_crash_is_left_out_and_spoils_no_later_one(tmp_path: Path, kept: int) -> None:
    log(tmp_path, 10, 20, 30)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:kept])
    assert steps(tmp_path) == [10, 20]
    log(tmp_path, 30, 40)
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_step_is_new_until_an_earlier_session_has_reported_it(tmp_path: Path) -> None:
    log(tmp_path, 10)
    tracker = JsonlTracker(tmp_path)
    assert [tracker.is_new(step) for step in (9, 10, 11)] == [False, False, True]


def test_pictures_lie_under_their_name_and_step(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in (5, 1000):
        tracker.figure("samples", step, Image.new("RGB", (8, 8), "red"))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000005.png", "step_00001000.png"]
    with Image.open(tmp_path / "samples" / "step_00000005.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_params_and_tags_are_written_down(tmp_path: Path) -> None:
    JsonlTracker(tmp_path).params({"optimizer.lr": 1e-3, "data.dir": tmp_path}, {"commit": "abc"})
    told = json.loads((tmp_path / "params.json").read_text())
    assert told == {"params": {"optimizer.lr": 1e-3, "data.dir": str(tmp_path)}, "tags": {"commit": "abc"}}


def kinds(folder: Path) -> list[str]:
    return [row["kind"] for row in JsonlTracker(folder).outbox.rows()]


def test_the_outbox_names_what_happened_in_its_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="torn"), JsonlTracker(run) as tracker:
        tracker.params({"a": 1}, {"seed": "0"})
        tracker.artifact(run / "config.yaml")
        tracker.artifact(tmp_path / "elsewhere.txt")
        tracker.figure("samples", 5, Image.new("RGB", (8, 8)))
        raise ValueError("torn\npaper")
    assert kinds(run) == ["status", "tags", "params", "artifact", "artifact", "figure", "status"]
    rows = list(tracker.outbox.rows())
    assert [rows[i]["file"] for i in (3, 4, 5)] == [
        "config.yaml", str(tmp_path / "elsewhere.txt"), "samples/step_00000005.png",
    ]  # fmt: skip
    assert (rows[-1]["status"], rows[-1]["error"]) == ("FAILED", "ValueError: torn paper")


def test_picture_painted_again_after_a_resume_is_noted_once(tmp_path: Path) -> None:
    for _ in range(2):
        JsonlTracker(tmp_path).figure("samples", 5, Image.new("RGB", (8, 8)))
    assert kinds(tmp_path) == ["figure"]


def test_end_of_a_run_that_was_killed_can_be_noted_by_another(tmp_path: Path) -> None:
    with JsonlTracker(tmp_path):
        note_end(tmp_path, "FAILED", "killed by signal 9")
        last = list(JsonlTracker(tmp_path).outbox.rows())[-1]
    assert (last["kind"], last["status"], last["error"]) == ("status", "FAILED", "killed by signal 9")
