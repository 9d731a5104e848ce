"""Files and folders that are whole or not there."""

from pathlib import Path

import pytest

from nai_xl.files import replace_folder


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    def write(name: str, fails: bool = False) -> Path:
        def into(aside: Path) -> None:
            aside.mkdir()
            (aside / name).touch()
            if fails:
                raise OSError("no space left")

        return replace_folder(tmp_path / "pipeline", into)

    write("first")
    with pytest.raises(OSError, match="no space left"):
        write("broken", fails=True)
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["first"]
    assert [path.name for path in write("second").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
