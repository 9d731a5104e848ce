"""The run directory: its lock, the data it was begun with, and what it was asked for."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl.errors import UserError
from nai_xl.record.config import Params, read_config, read_params, write_config, write_params
from nai_xl.record.json_file import Damaged
from nai_xl.record.run_dir import RunDirectory


def test_the_lock_is_held_inside_the_block_and_free_after_it_however_it_ends(tmp_path: Path) -> None:
    home = RunDirectory(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), home.locked():
            with pytest.raises(UserError, match="is being trained by another process; set name=NAME"), home.locked():
                raise AssertionError("two hold one lock")
            raise ZeroDivisionError


def test_a_run_is_continued_on_its_own_data_alone(tmp_path: Path) -> None:
    home = RunDirectory(tmp_path)
    home.claim_data("abc", 12)
    home.claim_data("abc", 12)
    with pytest.raises(UserError, match=r"12 images then, 11 now"):
        home.claim_data("def", 11)
    for content in ("", '{"data": "abc"', "[]", "{}"):
        home.data.write_text(content)
        with pytest.raises(Damaged, match=r"run\.json is damaged .*; remove the file"):
            home.claim_data("abc", 12)
    home.data.unlink()
    home.claim_data("def", 11)


def test_a_folder_that_cannot_be_written_is_named_with_the_override(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir=.*file cannot be written .*; set output_dir=DIR"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_the_config_is_kept_with_its_interpolations_resolved(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None and read_config(tmp_path / "none") is None
    write_config(tmp_path, OmegaConf.create({"a": {"b": 1e-3}, "c": "${a.b}", "_target_": "gone.away"}))
    assert read_config(tmp_path) == {"a": {"b": 1e-3}, "c": 1e-3, "_target_": "gone.away"}


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n", b"\xff", b"5", b"a: ${", b"abc", b""])
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(
        Damaged, match=r"config\.yaml is damaged .*; restore it from a copy, or remove the run's directory"
    ):
        read_config(tmp_path)


def test_params_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_params(tmp_path) == Params()
    write_params(tmp_path, {"loss": "minsnr", "optimizer.lr": 1e-3, "data.dir": tmp_path}, {"seed": "0"})
    assert read_params(tmp_path) == Params(
        {"loss": "minsnr", "optimizer.lr": 1e-3, "data.dir": str(tmp_path)}, {"seed": "0"}
    )
    (tmp_path / "params.json").write_text('{"params": 1}')
    with pytest.raises(Damaged, match=r"params\.json is damaged"):
        read_params(tmp_path)
    assert read_params(tmp_path / "params.json") == Params()  # a file in the run's place has none either
