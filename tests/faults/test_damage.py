"""Damaged checkpoints and cache entries: named, set aside or made anew, and never trained on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from nai_xl import precompute
from nai_xl.engine.checkpoint import LocalCheckpoints
from nai_xl.errors import UserError
from nai_xl.train import train
from tests.conftest import Alone
from tests.faults.conftest import left_by

Compose = Callable[..., DictConfig]
WEIGHTS = "part.safetensors"


class Part:
    """A Stateful of one tensor and one number."""

    def __init__(self, number: int):
        self.state: dict[str, Any] = {"weights": torch.full((64,), float(number)), "number": number}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def saved(folder: Path, *numbers: int) -> None:
    with LocalCheckpoints(folder, keep=9, strategy=Alone()) as made:
        for number in numbers:
            made.bind(part=Part(number))
            made.save(number, {"train/loss": 1.0})


def loaded(folder: Path) -> tuple[int, LocalCheckpoints]:
    """The number that was restored, after checking that all of its part belongs together."""
    part = Part(0)
    made = LocalCheckpoints(folder, keep=9, strategy=Alone())
    made.bind(part=part)
    step = made.load_latest()
    assert part.state["number"] == step and bool((part.state["weights"] == step).all())
    return step, made


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flipped(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: rewritten(f / WEIGHTS, lambda c: c[:-8]), "part.safetensors has 328 bytes of 336"),
    "one bit of a weight": (lambda f: rewritten(f / WEIGHTS, lambda c: flipped(c, -9)), "checksum of part.safetensors"),
    "one bit of a header": (lambda f: rewritten(f / WEIGHTS, lambda c: flipped(c, 20)), "checksum of part.safetensors"),
    "zeros": (lambda f: rewritten(f / WEIGHTS, lambda c: bytes(len(c))), "checksum of part.safetensors"),
    "a file missing": (lambda f: (f / WEIGHTS).unlink(), "part.safetensors is missing"),
    "another run's file": (
        lambda f: save_file({"part/weights": torch.zeros(64)}, f / WEIGHTS),
        "part.safetensors",
    ),
    "no state.json": (lambda f: (f / "state.json").unlink(), "No such file"),
    "state.json empty": (lambda f: (f / "state.json").write_bytes(b""), "Expecting value"),
    "state.json zeros": (lambda f: rewritten(f / "state.json", lambda c: bytes(len(c))), "Expecting value"),
    "state.json not JSON of ours": (lambda f: (f / "state.json").write_text("[1]"), "no JSON object"),
    "state.json of something else": (lambda f: (f / "state.json").write_text('{"step": 2}'), "parts"),
    "step edited": (
        lambda f: rewritten(f / "state.json", lambda c: c.replace(b'"step": 2', b'"step": 3')),
        "checksum of state.json",
    ),
    "a number edited": (
        lambda f: rewritten(f / "state.json", lambda c: c.replace(b'{"value": 2}', b'{"value": 1}')),
        "checksum of state.json",
    ),
    "folder renamed": (lambda f: f.rename(f.with_name("step_00000003")), "state.json says step 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    hurt, words = DAMAGES[damage]
    saved(tmp_path, 1, 2)
    hurt(tmp_path / "step_00000002")
    step, made = loaded(tmp_path)
    assert step == 1
    (remark,) = made.remarks
    (aside,) = tmp_path.glob("*.damaged")
    assert words in remark and str(aside) in remark
    assert made.latest_step() == 1
    again, made = loaded(tmp_path)
    assert again == 1 and not made.remarks  # said once


@pytest.mark.parametrize("place", range(0, 700, 37))
def test_any_changed_byte_of_state_json_is_noticed_or_changes_nothing(tmp_path: Path, place: int) -> None:
    saved(tmp_path, 1, 2)
    state = tmp_path / "step_00000002" / "state.json"
    before = json.loads(state.read_text())
    rewritten(state, lambda content: flipped(content, place))
    step, _ = loaded(tmp_path)
    assert step == 1 or json.loads(state.read_text()) == before


def test_two_damaged_ones_and_a_name_that_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step_00000003.damaged").mkdir()
    for number in (2, 3):
        (tmp_path / f"step_0000000{number}" / WEIGHTS).unlink()
    step, made = loaded(tmp_path)
    assert step == 1 and len(made.remarks) == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_00000001", "step_00000002.damaged", "step_00000003.damaged", "step_00000003.damaged-2"}


def test_without_a_whole_one_nothing_is_lost_or_begun_anew(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for number in (1, 2):
        rewritten(tmp_path / f"step_0000000{number}" / WEIGHTS, lambda content: flipped(content, -1))
    for _ in range(2):
        with pytest.raises(UserError, match=r"step_0000000.*damaged.*no whole checkpoint is left.*name=NAME"):
            loaded(tmp_path)
    assert len(list(tmp_path.glob("*.damaged/part.safetensors"))) == 2
    shutil.copytree(tmp_path / "step_00000001.damaged", tmp_path / "step_00000001")
    rewritten(tmp_path / "step_00000001" / WEIGHTS, lambda content: flipped(content, -1))
    assert loaded(tmp_path)[0] == 1


def test_version_0_1_without_checksums_is_set_aside_where_its_files_contradict_themselves(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        folder = tmp_path / f"step_0000000{number}"
        folder.mkdir()
        tree = {"items": [["weights", {"tensor": "part/weights"}], ["number", {"value": number}]]}
        (folder / "state.json").write_text(json.dumps({"step": number, "parts": {"part": tree}}))
        save_file({"part/weights": torch.full((64,), float(number))}, folder / WEIGHTS)
    rewritten(tmp_path / "step_00000003" / WEIGHTS, lambda content: content[:-1])
    (tmp_path / "step_00000002" / "state.json").write_text('{"step": 3, "parts": {}}')
    step, made = loaded(tmp_path)
    assert step == 1 and len(made.remarks) == 2


def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_been_and_says_so_once(
    hurt: Compose, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(hurt("output_dir=damaged", "run.max_images=8"), {})
    rewritten(folder / "checkpoints" / "step_00000004" / "ema.safetensors", lambda content: flipped(content, -5))
    assert train(hurt("output_dir=damaged"), {}) == folder
    assert capsys.readouterr().out.count("step_00000004 is damaged (the checksum of ema.safetensors is wrong)") == 1
    left = left_by(folder)
    assert (left["rows"], left["state"]) == (undisturbed["rows"], undisturbed["state"])


def shards_of_latents(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(cache.rglob("latents-*.safetensors"))}


def test_a_damaged_latent_is_made_anew_at_the_start_and_the_losses_are_the_same(
    hurt: Compose, tmp_path: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    folder = train(hurt("output_dir=bad", f"cache.dir={cache}", "run.max_images=8"), {})
    latents, *_ = shards_of_latents(cache)
    rewritten(latents, lambda content: content[:-40] + bytes(40))
    train(hurt("output_dir=bad", f"cache.dir={cache}"), {})
    assert "1 damaged entry made anew" in capsys.readouterr().err
    assert left_by(folder)["rows"] == undisturbed["rows"]


def test_a_latent_that_is_damaged_during_training_is_named_and_the_same_command_goes_on(
    hurt: Compose, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("nai_xl.engine.encode.READ_FIRST", 0)  # as where there are too many to read them first
    folder = train(hurt("output_dir=bad", f"cache.dir={cache}", "run.max_images=8"), {})
    whole = shards_of_latents(cache)
    for path in whole:
        rewritten(path, lambda content: content[:4096] + bytes(byte ^ 1 for byte in content[4096:]))
    with pytest.raises(UserError, match=r"cached entry .* same command again, which makes it anew"):
        train(hurt("output_dir=bad", f"cache.dir={cache}"), {})
    for path, content in whole.items():
        path.write_bytes(content)
    train(hurt("output_dir=bad", f"cache.dir={cache}"), {})
    assert left_by(folder)["rows"] == undisturbed["rows"]


def test_verify_lists_what_is_damaged_by_file_and_discards_it(
    hurt: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = hurt(f"cache.dir={tmp_path / 'cache'}")
    with pytest.raises(UserError, match=r"0 entries are whole, and \d+ are not there yet: .*precompute"):
        precompute.verify(cfg, {})
    precompute.precompute(cfg, {})
    precompute.verify(cfg, {})
    count = int(re.search(r"verified: (\d+) entries", capsys.readouterr().out)[1])  # type: ignore[index]
    files = [*shards_of_latents(tmp_path / "cache")][:2]
    for path in files:
        rewritten(path, lambda content: flipped(content, -3))
    with pytest.raises(UserError) as told:
        precompute.verify(cfg, {})
    *lines, last = str(told.value).splitlines()
    assert [line.partition(": row ")[0] for line in lines] == [str(path) for path in files]
    assert all("(wrong checksum)" in line for line in lines) and f"2 of {count} entries are damaged" in last
    precompute.precompute(cfg, {})
    assert "2 damaged entries made anew" in capsys.readouterr().err
    precompute.verify(cfg, {})
