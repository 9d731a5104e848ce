"""arm.json: who writes it, what it says after each end, and what happens when it is damaged."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, ArmRecord, arm_so_far, read_arm, write_arm
from nai_xl.record.json_file import Damaged
from nai_xl.record.run_dir import RunDirectory


def note(path: Path, sweep: str | None = "s") -> ArmRecord:
    return ArmRecord(RunDirectory(path), Arm(sweep, {"loss": "uniform"}, 0, "00000000"))


def test_what_becomes_of_a_run_is_noted(tmp_path: Path) -> None:
    for error, status in ((None, "FINISHED"), (KeyboardInterrupt(), "STOPPED"), (ValueError("a\nb"), "FAILED")):
        try:
            with note(tmp_path) as kept:
                kept.begin()
                assert (read_arm(tmp_path) or kept.arm).status == "RUNNING"
                kept.reached(3, 4)
                if error:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        arm = read_arm(tmp_path)
        assert arm and (arm.status, arm.steps, arm.images) == (status, 3, 12)
        assert arm.error == ("ValueError: a b" if status == "FAILED" else None)


def test_a_run_in_other_hands_is_not_noted(tmp_path: Path) -> None:
    with note(tmp_path) as mine:
        mine.begin()
    with note(tmp_path).home.locked():
        note(tmp_path).end("FAILED", "not mine to tell")
    assert (read_arm(tmp_path) or mine.arm).status == "FINISHED"
    with pytest.raises(UserError), note(tmp_path / "new", sweep=None):
        raise UserError("a mistake before anything began")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError), note(tmp_path) as kept:
        kept.begin()
        monkeypatch.setattr("nai_xl.record.arm.write_json", full)
        raise ZeroDivisionError


def test_the_place_among_all_arms_is_kept_whatever_selection_is_trained(tmp_path: Path) -> None:
    for place in (1, 4, 0):
        write_arm(tmp_path, Arm("s", {"loss": "uniform"}, status="FINISHED", place=place))
    found = read_arm(tmp_path)
    assert found and found.places == {"s": 4}
    ArmRecord(RunDirectory(tmp_path), Arm("s", {"loss": "uniform"}, place=6)).adopt(found)
    assert (read_arm(tmp_path) or found).places == {"s": 6}
    ArmRecord(RunDirectory(tmp_path), Arm("t", {"loss": "uniform"}, place=2)).adopt(found)
    assert (read_arm(tmp_path) or found).places == {"s": 6, "t": 2}


def test_a_run_can_be_an_arm_of_two_sweeps(tmp_path: Path) -> None:
    write_arm(tmp_path, Arm("first", {"loss": "uniform"}, 0, "00000000", "FINISHED", steps=7))
    other = ArmRecord(RunDirectory(tmp_path), Arm("second", {"lr": 1e-3}, 0, "00000000"))
    found = read_arm(tmp_path)
    assert found
    other.adopt(found)
    arm = read_arm(tmp_path)
    assert arm and (arm.sweep, arm.arm, arm.status, arm.steps) == ("second", {"lr": 1e-3}, "FINISHED", 7)
    assert arm.sweeps == {"first": {"loss": "uniform"}, "second": {"lr": 1e-3}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_arm(tmp_path) is None
    arm = Arm("s", {"lr": 1e-3, "memory": [1, None], "a": "b"}, 3, "00000000", "FAILED", "why", 1.5, 2, 4, 0.5)
    write_arm(tmp_path, arm)
    assert read_arm(tmp_path) == Arm(**{**vars(arm), "sweeps": {"s": dict(arm.arm)}})


def test_keys_of_another_version_are_left_out_and_missing_ones_have_their_default(tmp_path: Path) -> None:
    (tmp_path / "arm.json").write_text(json.dumps({"sweep": "s", "arm": {"a": 1}, "unknown": 1}))
    assert read_arm(tmp_path) == Arm("s", {"a": 1})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOF"),
        (b'{"sweep": "s", "arm": {', "EOF"),
        (b"[1]", "object"),
        (b'{"seed": "many"}', "seed: Input should be a valid integer"),
        (b'{"status": "LOST"}', "'RUNNING', 'FINISHED'"),
        (b'{"sweep": "\xff"}', "unicode"),
    ],
)
def test_a_damaged_file_is_named_with_the_cure_and_replaced_by_a_run(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "arm.json"
    path.write_bytes(content)
    with pytest.raises(Damaged) as told:
        read_arm(tmp_path)
    assert isinstance(told.value, UserError) and "\n" not in str(told.value)
    assert str(told.value).startswith(f"{path} is damaged (") and reason in str(told.value)
    assert str(told.value).endswith("; train that run again, or remove the file")
    assert arm_so_far(tmp_path) is None
    with note(tmp_path) as kept:
        kept.reached(3, 4)
    arm = read_arm(tmp_path)
    assert arm and (arm.sweep, arm.status, arm.steps) == ("s", "FINISHED", 3)


def test_a_full_disk_still_takes_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_arm(tmp_path, Arm(sweep="s"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nai_xl.record.json_file.write_atomically", full)
    write_arm(tmp_path, Arm(sweep="s", status="FAILED", error="the disk is full"))
    found = read_arm(tmp_path)
    assert found and (found.status, found.error) == ("FAILED", "the disk is full")
    with pytest.raises(OSError):  # and never a part of what is longer than the room it has
        write_arm(tmp_path, Arm(error="x" * 10**6))
    assert read_arm(tmp_path) == found
