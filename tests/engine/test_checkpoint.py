"""Checkpoints: everything comes back, nothing half-written is ever believed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nai_xl.engine import checkpoint as module
from nai_xl.engine.checkpoint import LocalCheckpoints, ModuleState, join_tensors, split_tensors
from nai_xl.errors import UserError
from tests.conftest import Alone


class Holder:
    """A Stateful that holds whatever it is given."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state or {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def checkpoints(folder: Path, keep: int = 2, **parts: Any) -> LocalCheckpoints:
    made = LocalCheckpoints(folder, keep=keep, strategy=Alone())
    made.bind(**parts)
    return made


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and found.shape == expected.shape and bool((found == expected).all())
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and (found == expected or (found != found and expected != expected))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | TENSORS
KEYS = st.integers(-3, 3) | st.text("ab/0", max_size=4)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(deadline=None, max_examples=150)
@given(state=st.dictionaries(KEYS, NESTED, max_size=4))
def test_any_nested_state_survives_being_split_into_json_and_tensors(state: dict[Any, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(split_tensors(state, "part", tensors)))
    assert same(join_tensors(tree, tensors), state)


def test_keys_that_look_alike_keep_their_own_tensors() -> None:
    state = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": torch.tensor(3)}, "a/b": torch.tensor(4)}
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(split_tensors(state, "part", tensors)))
    assert same(join_tensors(tree, tensors), state)


def test_state_comes_back_from_disk_with_its_step_types_and_shared_tensors(tmp_path: Path) -> None:
    tied = torch.randn(3, 2)
    state = {
        "a": {0: torch.tensor(1.5), "b": [torch.arange(3), None, True, 1e-300, "x"]},
        "nothing": {},
        "empty": torch.zeros(0, 4),
        "half": torch.randn(5).bfloat16(),
        "tied": [tied, tied],
        "turned": tied.T,
    }
    checkpoints(tmp_path, part=Holder(state), other=Holder({"lr": 0.1})).save(7)
    part, other = Holder(), Holder()
    fresh = checkpoints(tmp_path, part=part, other=other)
    assert fresh.latest_step() == 7
    assert fresh.load_latest() == 7
    assert same(part.state, state)
    assert other.state == {"lr": 0.1}


def test_nothing_saved_means_step_zero_and_touches_nothing(tmp_path: Path) -> None:
    part = Holder({"kept": 1})
    fresh = checkpoints(tmp_path / "not there", part=part)
    assert (fresh.latest_step(), fresh.load_latest(), part.state) == (0, 0, {"kept": 1})


def training(seed: int, make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, make(model.parameters())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=fused, amsgrad=True)

    whole, optimizer = training(0, make)
    steps(whole, optimizer, range(8))
    first, optimizer = training(0, make)
    steps(first, optimizer, range(3))
    checkpoints(tmp_path, unet=ModuleState(first), optimizer=optimizer).save(3)
    second, optimizer = training(1, make)
    step = checkpoints(tmp_path, unet=ModuleState(second), optimizer=optimizer).load_latest()
    steps(second, optimizer, range(step, 8))
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    assert not all(map(torch.equal, first.parameters(), whole.parameters()))


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    second = Alone()
    second.first = False
    made = LocalCheckpoints(tmp_path, keep=1, strategy=second)
    made.bind(part=Holder({"a": 1}))
    made.save(1)
    assert made.latest_step() == 0 and not list(tmp_path.iterdir())


def test_files_are_json_and_safetensors_only(tmp_path: Path) -> None:
    model, optimizer = training(0, torch.optim.AdamW)
    steps(model, optimizer, range(2))
    folder = checkpoints(tmp_path, unet=ModuleState(model), optimizer=optimizer).save(2)
    assert sorted(path.name for path in folder.iterdir()) == ["optimizer.safetensors", "state.json", "unet.safetensors"]
    json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    part = Holder()
    made = checkpoints(tmp_path, keep, part=part)
    for step in (5, 10, 100, 1000):
        part.state = {"step": step}
        made.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (5, 10, 100, 1000)[-keep:]]
    made.load_latest()
    assert part.state == {"step": 1000}


def test_same_step_may_be_saved_again(tmp_path: Path) -> None:
    for value in (1, 2):
        checkpoints(tmp_path, part=Holder({"value": value})).save(4)
    part = Holder()
    assert checkpoints(tmp_path, part=part).load_latest() == 4
    assert part.state == {"value": 2}


def test_folder_left_by_a_kill_is_ignored_and_written_over(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, part=Holder({"value": 1}))
    made.save(4)
    torn = tmp_path / "step_00000008.tmp"
    torn.mkdir()
    (torn / "state.json").write_text("{}")
    bare = tmp_path / "step_00000009"
    bare.mkdir()
    assert made.latest_step() == 4
    assert made.load_latest() == 4
    made.save(8)
    assert made.latest_step() == 8
    assert not torn.exists()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_full_disk_leaves_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    part, other = Holder({"value": torch.ones(2)}), Holder({"value": torch.ones(2)})
    made = checkpoints(tmp_path, 1, part=part, other=other)
    made.save(4)
    calls, save_file = [], safetensors.torch.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == failing_call:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    part.state = {"value": torch.zeros(2)}
    with pytest.raises(UserError, match=r"step_00000008.*No space left.*output_dir=DIR"):
        made.save(8)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    assert made.load_latest() == 4
    assert torch.equal(part.state["value"], torch.ones(2))


@pytest.mark.parametrize("file", ["state.json", "part.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"step": 8}', b"\xff\xfe"])
def test_damaged_file_is_an_error_that_names_the_folder(tmp_path: Path, file: str, damage: bytes) -> None:
    part = Holder({"value": torch.ones(2)})
    made = checkpoints(tmp_path, part=part)
    (made.save(8) / file).write_bytes(damage)
    with pytest.raises(UserError, match=r"step_00000008 is damaged.*remove that folder"):
        made.load_latest()
    assert torch.equal(part.state["value"], torch.ones(2))


def test_lost_weights_are_an_error_that_names_the_folder(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, part=Holder({"value": torch.ones(2)}))
    (made.save(8) / "part.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_00000008 is damaged"):
        made.load_latest()


def test_part_that_the_checkpoint_lacks_is_an_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    checkpoints(tmp_path, part=Holder({"value": 1})).save(8)
    part = Holder({"value": 2})
    with pytest.raises(UserError, match="step_00000008"):
        checkpoints(tmp_path, part=part, more=Holder()).load_latest()
    assert part.state == {"value": 2}


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        ModuleState(nn.Linear(2, 3)).load_state_dict(ModuleState(nn.Linear(3, 2)).state_dict())
