"""Where a run lies, whatever its folders are called; and what is printed outlasts its reader."""

import os
import sys
from pathlib import Path

import pytest

from nai_xl import config
from nai_xl.config import cli
from nai_xl.config.streams import Lasting, lasting
from nai_xl.engine.console import Screen
from nai_xl.errors import UserError
from nai_xl.tracker.mlflow.store import default_uri


def test_the_home_directory_is_meant_by_a_quoted_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config.compose(["output_dir='~/out'", "name=mine", "cache.dir='~/cache'"])
    assert config.run_dir(cfg, {}).parent == tmp_path / "out"
    assert config.build(cfg.cache).dir == tmp_path / "cache"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/abs", "a//b", ".", "'a\tb'", "'a '", "x" * 300])
def test_a_name_stays_in_output_dir(name: str) -> None:
    with pytest.raises(UserError, match="name="):
        config.run_dir(config.compose([f"name={name}"]), {})


def test_a_name_with_folders_is_one(tmp_path: Path) -> None:
    cfg = config.compose([f"output_dir={tmp_path}", "name=a/b"])
    assert config.run_dir(cfg, {}).parent == tmp_path / "a"


def test_brackets_of_a_path_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(silent=False)
    screen.table("nai_xl", {"results": "out [v2]/[/v2]"})
    screen.say("out [v2]/[/v2]")
    assert capsys.readouterr().out.count("out [v2]/[/v2]") == 2


def test_a_store_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import make_url

    for name in ("a%20b", "c?d", "e#f", "g h"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert make_url(default_uri()).database == str(tmp_path / name / "mlflow.db")


def test_a_word_that_is_not_utf_8_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", os.fsdecode(b"data.dir=caf\xe9")])
    with pytest.raises(SystemExit):
        cli.entry_point(lambda cfg, choices: None)()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "data.dir=caf" in told and "not UTF-8" in told


def test_a_stream_outlasts_its_reader() -> None:
    read, write = os.pipe()
    stream = lasting(os.fdopen(write, "w"))
    assert stream.write("before\n") and stream.flush() is None and os.read(read, 10) == b"before\n"
    os.close(read)
    print("after " * 10000, file=stream)
    stream.flush()
    print("and on", file=stream, flush=True)
    assert isinstance(stream, Lasting) and lasting(stream) is stream
    stream.stream.close()
    lasting(None).write("a program started without stdout")
