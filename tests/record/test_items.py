"""Values of single items: written once a step, read back whatever happened to the file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.record.items import items_path, read_items, report, write_items

tables = st.dictionaries(st.text(min_size=1, max_size=8), st.floats(allow_nan=False), max_size=5)


@given(st.lists(st.tuples(st.integers(0, 5), tables), max_size=8))
def test_each_step_is_kept_once_as_it_was_first(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:  # type: ignore[type-arg]
    run = tmp_path_factory.mktemp("run")
    first: dict[int, dict[str, float]] = {}
    for step, values in rows:
        write_items(run, "val/loss", step, values)
        first.setdefault(step, values)
    assert read_items(run, "val/loss") == first
    path = items_path(run, "val/loss")
    assert not first or len(path.read_text(encoding="utf-8").split("\n")) == len(first) + 1


def test_the_file_is_named_after_the_metric(tmp_path: Path) -> None:
    write_items(tmp_path, "val/loss", 1, {"a": 1})
    assert (tmp_path / "items" / "val__loss.jsonl").read_text().startswith('{"step": 1, "values": {"a": 1.0}}')


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_torn_by_a_crash_is_written_again(tmp_path: Path, cut: int) -> None:
    for step in (1, 2):
        write_items(tmp_path, "val/loss", step, {"a": step, "b": 2 * step})
    path = items_path(tmp_path, "val/loss")
    path.write_bytes(path.read_bytes()[:-cut])
    for step in (2, 3):
        write_items(tmp_path, "val/loss", step, {"a": step, "b": 2 * step})
    assert read_items(tmp_path, "val/loss") == {step: {"a": step, "b": 2 * step} for step in (1, 2, 3)}


def test_nothing_measured_is_nothing_read(tmp_path: Path) -> None:
    assert read_items(tmp_path, "val/loss") == {}


def test_report_gives_means_of_what_has_items(tmp_path: Path) -> None:
    found = report(tmp_path, 7, {"val/loss": {"a": 1.0, "b": 2.0}, "val/x0_loss_logsnr_-5": {}})
    assert found == {"val/loss": 1.5}
    assert read_items(tmp_path, "val/loss") == {7: {"a": 1.0, "b": 2.0}}
