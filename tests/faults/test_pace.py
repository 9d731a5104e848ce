"""Images a step and chunk are a run's identity; how they are split over processes and micro-batches is not."""

import json
from pathlib import Path

import pytest

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, write_arm
from nai_xl.record.config import write_config
from nai_xl.record.pace import Pace, pace_of

CHOICES = {"task": "text_to_image", "model": "tiny", "schedule": "ztsnr", "parameterization": "v", "loss": "minsnr"}


def placed(world: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return config.run_dir(config.compose(["name=r", *overrides]), CHOICES)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, "run.batch_size=8"),
        (1, "run.batch_size=16"),
        (1, "run.batch_size=8 run.grad_accum=2 run.chunk=16"),
        (2, "run.batch_size=4 run.grad_accum=2 run.chunk=16"),
    ],
)
def test_every_split_is_one_run(world: int, overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert placed(world, monkeypatch, *overrides.split()) == placed(1, monkeypatch, "run.batch_size=16")


def test_other_images_a_step_or_chunks_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    others = ["run.batch_size=8", "run.batch_size=8 run.grad_accum=2", "run.batch_size=16 run.chunk=32"]
    places = {placed(1, monkeypatch, *words.split()) for words in [*others, "run.batch_size=16"]}
    assert len(places) == 4
    assert placed(2, monkeypatch, "run.batch_size=16") not in places


def old_run(home: Path, pace: Pace, *overrides: str) -> None:
    """What an earlier version has left of a run that has trained at this pace."""
    state = {
        "step": 4,
        "parts": {"pace": {"items": [[key, {"value": value}] for key, value in pace._asdict().items()]}},
    }
    folder = home / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    write_config(home, config.compose(["name=r", *overrides]))
    write_arm(home, Arm(signature=home.name[-8:], status="STOPPED"))
    assert pace_of(home) == pace
    aside = home / "checkpoints" / "step_00000008.damaged"
    aside.mkdir()
    (aside / "state.json").write_text(json.dumps(state).replace(f"{pace.images_per_step}", "99"))
    assert pace_of(home) == pace


def test_a_run_of_several_processes_is_found_where_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = placed(1, monkeypatch, "run.batch_size=8")  # where 2 x 8 was put before
    old_run(there, Pace(16, 16), "run.batch_size=8")
    assert placed(2, monkeypatch, "run.batch_size=8") == placed(1, monkeypatch, "run.batch_size=16") == there
    assert placed(1, monkeypatch, "run.batch_size=32") != there


def test_a_run_with_a_chunk_is_found_where_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = Path("outputs/r-0123abcd")
    old_run(there, Pace(16, 16), "run.batch_size=8", "run.grad_accum=2", "run.chunk=16")
    assert placed(1, monkeypatch, "run.batch_size=8", "run.grad_accum=2", "run.chunk=16") == there
    assert placed(1, monkeypatch, "run.batch_size=8", "run.grad_accum=2") != there


def test_another_pace_is_refused_with_what_continues_the_run() -> None:
    with pytest.raises(UserError, match=r"run\.grad_accum=2 and run\.chunk=16 continue it"):
        Pace(8, 8).refuse_other(Pace(16, 16), wide=8)
    with pytest.raises(UserError, match=r"another run\.batch_size or number of processes"):
        Pace(24, 24).refuse_other(Pace(16, 16), wide=24)
    Pace(8, 8).refuse_other(None, wide=8)


def test_an_unfinished_run_of_another_pace_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = placed(1, monkeypatch, "run.batch_size=8")
    cfg = config.compose(["name=r", "run.batch_size=8"])
    other = placed(1, monkeypatch, "run.batch_size=16")
    old_run(other, Pace(16, 16), "run.batch_size=16")
    write_arm(other, Arm(signature=other.name[-8:], status="STOPPED", kin=config.kin(cfg)))
    assert config.unfinished_kin(cfg, here) == {other: Pace(16, 16)}
    write_arm(other, Arm(signature=other.name[-8:], status="FINISHED", kin=config.kin(cfg)))
    assert config.unfinished_kin(cfg, here) == {}


def test_a_run_that_was_begun_with_cached_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = placed(1, monkeypatch, "text.chunks=3")
    write_arm(before, Arm(signature=before.name[-8:], status="STOPPED"))
    cfg, here = config.compose(["name=r", "text=live", "text.chunks=3"]), placed(1, monkeypatch, "text=live")
    assert config.unfinished_with_cached_text(cfg, here) == before
    assert config.unfinished_with_cached_text(config.compose(["name=r", "text=live"]), here) is None
    assert config.unfinished_with_cached_text(config.compose(["name=r", "text.chunks=3"]), before) is None
    write_arm(before, Arm(signature=before.name[-8:], status="FINISHED"))
    assert config.unfinished_with_cached_text(cfg, here) is None
