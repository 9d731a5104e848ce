"""The record of looks at a sweep."""

from pathlib import Path

import pytest

from nai_xl.record.json_file import Damaged
from nai_xl.record.looks import ArmLook, Look, read_looks, write_looks


def test_looks_are_read_as_they_were_written(tmp_path: Path) -> None:
    arms = {"loss=minsnr": ArmLook((0, 1, 2), 800, planned=True, level=0.0114)}
    look = Look("2025-01-01T00:00:00+00:00", "loss=uniform", ("val/loss",), 5, (3, 5), arms, {"val/loss": {}})
    assert read_looks(tmp_path / "compare-x") == []
    write_looks(tmp_path / "compare-x", [look, look])
    assert read_looks(tmp_path / "compare-x") == [look, look]
    (tmp_path / "compare-x" / "looks.json").write_text("[{}]")
    with pytest.raises(Damaged, match=r"looks\.json is damaged .*restore it from a copy"):
        read_looks(tmp_path / "compare-x")
