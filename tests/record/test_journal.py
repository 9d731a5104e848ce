"""Files of JSON lines: what is read of them whatever a crash has left."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.record.journal import Journal, metrics_of
from nai_xl.record.metrics import curves, last_step, last_value, objective


@given(lengths=st.lists(st.integers(0, 20), max_size=8), torn=st.integers(0, 30), stop=st.integers(0, 8))
def test_reader_of_a_journal_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], torn: int, stop: int
) -> None:
    """Whatever part of a last line a crash has left, before and after the writer mends it."""
    journal = Journal(tmp_path_factory.mktemp("journal") / "rows.jsonl")
    rows: list[dict[str, object]] = [{"number": i, "text": "\u00e9" * n} for i, n in enumerate(lengths)]
    for row in rows:
        journal.append(**row)
    with journal.path.open("ab") as file:
        file.write((json.dumps({"text": "a line of some length"}).encode())[:torn])
    ends = [0, *(end for end, _ in journal.after())]
    assert list(journal.rows()) == rows
    at = ends[min(stop, len(rows))]
    journal.mend()
    journal.append(number=-1)
    assert [row for _, row in journal.after(at)] == [*rows[min(stop, len(rows)) :], {"number": -1}]


def test_journal_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert [row for _, row in Journal(tmp_path / "rows.jsonl").after(1000)] == [{"a": 1}]


def test_a_missing_journal_has_no_rows_and_is_not_made_by_mending(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.mend()
    assert list(journal.rows()) == [] and not journal.path.exists()
    journal.path.touch()
    journal.mend()
    assert list(journal.rows()) == [] and journal.path.read_bytes() == b""


@pytest.mark.parametrize("damaged", [b"", b"{", b"null", b"[1]", b'"text"', b'{"a": "\xff"}', b"\x00\x00"])
def test_a_damaged_line_is_left_out_and_spoils_no_other_one(tmp_path: Path, damaged: bytes) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append(number=1)
    with journal.path.open("ab") as file:
        file.write(damaged + b"\n")
    journal.append(number=2)
    assert list(journal.rows()) == [{"number": 1}, {"number": 2}]


def test_what_a_run_has_measured_is_read_past_a_torn_line(tmp_path: Path) -> None:
    assert (curves(tmp_path), last_step(tmp_path), objective(tmp_path)) == ({}, 0, None)
    journal = metrics_of(tmp_path)
    for step, values in ((1, {"train/loss": 0.5}), (2, {"train/loss": 0.25, "val/loss": 2}), (3, {"train/loss": 1.0})):
        journal.append(step=step, time=7, **values)
    assert objective(tmp_path) == 2.0 == last_value(tmp_path, "val/loss")
    with journal.path.open("ab") as file:
        file.write(b'{"step": 4, "val/loss": 9')
    assert curves(tmp_path) == {"train/loss": {1: 0.5, 2: 0.25, 3: 1.0}, "val/loss": {2: 2.0}}
    assert (last_step(tmp_path), last_value(tmp_path, "train/loss"), last_value(tmp_path, "x")) == (3, 1.0, None)
    assert objective(tmp_path) == 2.0


def test_without_validation_a_search_minimises_the_last_training_loss(tmp_path: Path) -> None:
    for step in (1, 2):
        metrics_of(tmp_path).append(step=step, time=7, **{"train/loss": 1 / step})
    assert objective(tmp_path) == 0.5
