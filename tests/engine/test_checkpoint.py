"""Checkpoints: everything comes back, nothing half-written is ever believed."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nai_xl.distributed.shard import SavedTensor, Shard
from nai_xl.engine import checkpoint_writer
from nai_xl.engine.checkpoint import LocalCheckpoints, ModuleState
from nai_xl.engine.checkpoint_files import join_tensors, split_tensors
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
    assert same(join_tensors(tree, tensors.__getitem__), state)


def test_keys_that_look_alike_keep_their_own_tensors() -> None:
    state = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": torch.tensor(3)}, "a/b": torch.tensor(4)}
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(split_tensors(state, "part", tensors)))
    assert same(join_tensors(tree, tensors.__getitem__), state)


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
    written = checkpoints(tmp_path, part=Holder(state), other=Holder({"lr": 0.1}))
    written.save(7, {"train/loss": 0.5})
    written.finish()
    part, other = Holder(), Holder()
    fresh = checkpoints(tmp_path, part=part, other=other)
    assert fresh.latest_step() == 7
    assert fresh.load_latest() == 7 and fresh.unreported == {"train/loss": 0.5}
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
    saved = checkpoints(tmp_path, unet=ModuleState(first), optimizer=optimizer)
    saved.save(3)
    saved.finish()
    second, optimizer = training(1, make)
    step = checkpoints(tmp_path, unet=ModuleState(second), optimizer=optimizer).load_latest()
    steps(second, optimizer, range(step, 8))
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    assert not all(map(torch.equal, first.parameters(), whole.parameters()))


def test_files_are_json_and_safetensors_only(tmp_path: Path) -> None:
    model, optimizer = training(0, torch.optim.AdamW)
    steps(model, optimizer, range(2))
    saved = checkpoints(tmp_path, unet=ModuleState(model), optimizer=optimizer)
    folder = saved.save(2)
    saved.finish()
    assert sorted(path.name for path in folder.iterdir()) == ["optimizer.safetensors", "state.json", "unet.safetensors"]
    json.loads((folder / "state.json").read_text())
    read = dict(sorted(load_file(folder / "unet.safetensors").items()))
    assert same(read, dict(sorted((f"unet/{k}", v) for k, v in model.state_dict().items())))


def test_what_is_saved_is_what_was_there_at_the_call_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    write = checkpoint_writer.write_tensors

    def held_up(*given: Any) -> Any:
        goes_on.wait(10)
        return write(*given)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", held_up)
    part = Holder({"value": torch.ones(3), "turned": torch.arange(6.0).reshape(2, 3).T})
    made = checkpoints(tmp_path, part=part)
    made.save(1)
    part.state["value"].zero_(), part.state["turned"].zero_()
    assert not made.saved()
    goes_on.set()
    made.load_latest()
    assert same(part.state, {"value": torch.ones(3), "turned": torch.arange(6.0).reshape(2, 3).T})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    part = Holder()
    made = checkpoints(tmp_path, keep, part=part)
    for step in (5, 10, 100, 1000):
        part.state = {"step": step}
        made.save(step)
    made.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (5, 10, 100, 1000)[-keep:]]
    made.load_latest()
    assert part.state == {"step": 1000}


def test_same_step_may_be_saved_again(tmp_path: Path) -> None:
    for value in (1, 2):
        with checkpoints(tmp_path, part=Holder({"value": value})) as made:
            made.save(4)
    part = Holder()
    assert checkpoints(tmp_path, part=part).load_latest() == 4
    assert part.state == {"value": 2}


def test_folder_left_by_a_kill_is_ignored_and_written_over(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, part=Holder({"value": 1}))
    made.save(4)
    torn = tmp_path / "step_00000008.tmp"
    torn.mkdir()
    (torn / "state.json").write_text("{}")
    assert made.latest_step() == 4
    assert made.load_latest() == 4
    assert not torn.exists() and not made.remarks
    torn.mkdir()
    made.save(8)
    assert made.latest_step() == 8
    assert not torn.exists()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_full_disk_is_told_at_the_next_step_and_leaves_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    part, other = Holder({"value": torch.ones(2)}), Holder({"value": torch.ones(2)})
    made = checkpoints(tmp_path, 1, part=part, other=other)
    made.save(4)
    made.finish()
    calls, write = [], checkpoint_writer.write_tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
        calls.append(path)
        if len(calls) == failing_call:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full)
    part.state = {"value": torch.zeros(2)}
    made.save(8)
    with pytest.raises(UserError, match=r"step_00000008.*No space left.*output_dir=DIR"):
        made.finish()
    made.check()  # told once
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    assert made.load_latest() == 4
    assert torch.equal(part.state["value"], torch.ones(2))


def test_part_that_the_checkpoint_lacks_is_an_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    with checkpoints(tmp_path, part=Holder({"value": 1})) as made:
        made.save(8)
    part = Holder({"value": 2})
    with pytest.raises(UserError, match="step_00000008 was made by another configuration: it has no more"):
        checkpoints(tmp_path, part=part, more=Holder()).load_latest()
    assert part.state == {"value": 2} and (tmp_path / "step_00000008").is_dir()


def stored_by_0_1(folder: Path, step: int, **parts: dict[str, Any]) -> None:
    """As version 0.1 wrote it, with the library and without checksums."""
    folder.mkdir(parents=True)
    trees = {}
    for name, state in parts.items():
        tensors: dict[str, Tensor] = {}
        trees[name] = split_tensors(state, name, tensors)
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, "parts": trees}))


def test_checkpoints_of_version_0_1_are_read_and_have_nothing_left_to_report(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": [torch.tensor(2), {"c": 1.5}], 3: torch.zeros(0)}
    stored_by_0_1(tmp_path / "step_00000012", 12, part=state, other={"lr": 1})
    part, other = Holder(), Holder()
    fresh = checkpoints(tmp_path, part=part, other=other)
    assert fresh.load_latest() == 12 and fresh.unreported is None and not fresh.remarks
    assert same(part.state, state) and other.state == {"lr": 1}


# --- several ranks ----------------------------------------------------------------------------------------------------


class Rank(Alone):
    """One rank of several that share a folder; in one process, so that waiting is for nobody."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.first = rank, world, rank == 0


class ReadsRows(Holder):
    """A part that takes the rows it wants."""

    reads_rows = True


def cut(tensor: Tensor, rank: int, world: int) -> Shard:
    """Rows as torch's fully_shard spreads them: equal blocks, the last ones shorter or empty."""
    block = -(-len(tensor) // world)
    start = min(rank * block, len(tensor))
    return Shard(tensor[start : start + block], tuple(tensor.shape), start)


def written_by(folder: Path, world: int, step: int, state: Callable[[int], dict[str, Any]]) -> list[LocalCheckpoints]:
    """One checkpoint, saved rank by rank; the first one's thread waits for the others meanwhile."""
    ranks = []
    for rank in range(world):
        made = LocalCheckpoints(folder, keep=1, strategy=Rank(rank, world))
        made.bind(part=Holder(state(rank)))
        made.save(step)
        ranks.append(made)
    for made in ranks[::-1]:
        made.finish()
    return ranks


ROWS = st.tuples(st.integers(0, 9), st.lists(st.integers(1, 3), max_size=2), st.sampled_from(DTYPES)).map(
    lambda drawn: torch.arange(drawn[0] * math.prod(drawn[1])).reshape(drawn[0], *drawn[1]).to(drawn[2])
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(KEYS, ROWS, min_size=1, max_size=4),
    whole=NESTED,
    before=st.integers(1, 4),
    after=st.integers(1, 4),
)
def test_what_any_number_of_ranks_has_saved_any_other_number_reads(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[Any, Tensor], whole: Any, before: int, after: int
) -> None:
    folder = tmp_path_factory.mktemp("several")

    def state(rank: int) -> dict[str, Any]:
        return {"sharded": {key: cut(tensor, rank, before) for key, tensor in tensors.items()}, "whole": whole}

    written_by(folder, before, 3, state)
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    for rank in range(after):
        plain, rows = Holder(), ReadsRows()
        for part in (plain, rows):
            fresh = LocalCheckpoints(folder, keep=1, strategy=Rank(rank, after))
            fresh.bind(part=part)
            assert fresh.load_latest() == 3
        assert same(plain.state, {"sharded": tensors, "whole": whole})
        for key, tensor in tensors.items():
            saved: SavedTensor = rows.state["sharded"][key]
            mine = cut(tensor, rank, after)
            assert (saved.shape, saved.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert same(saved.rows(mine.start, mine.start + len(mine.local)), mine.local)
            assert same(saved.whole(), tensor)


def test_a_rank_writes_the_rows_it_holds_and_only_the_first_whole_tensors(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    written_by(tmp_path, 3, 1, lambda rank: {"rows": cut(rows, rank, 3), "whole": torch.full((2,), float(rank))})
    folder = tmp_path / "step_00000001"
    names = {f"part-0000{rank + 1}-of-00003.safetensors" for rank in range(3)}
    assert {path.name for path in folder.iterdir()} == {"state.json", "part.safetensors", *names}
    assert same(load_file(folder / "part.safetensors"), {"part/whole": torch.zeros(2)})
    assert same(load_file(folder / "part-00002-of-00003.safetensors"), {"part/rows": rows[2:4]})


def test_rows_that_two_ranks_hold_count_once_and_missing_rows_are_refused(tmp_path: Path) -> None:
    rows = torch.arange(4.0)
    written_by(tmp_path, 4, 1, lambda rank: {"rows": cut(rows, rank % 2, 2)})
    part = Holder()
    assert checkpoints(tmp_path, part=part).load_latest() == 1
    assert same(part.state, {"rows": rows})
    with pytest.raises(UserError, match=r"step_00000002 .*part/rows: no rank holds its rows from 1 on"):
        written_by(tmp_path, 2, 2, lambda rank: {"rows": cut(rows, 2 * rank, 4)})
    assert checkpoints(tmp_path, part=part).load_latest() == 1


def test_a_rank_that_cannot_write_is_named_by_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint_writer.write_tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full)
    ranks = [LocalCheckpoints(tmp_path, keep=1, strategy=Rank(rank, 2)) for rank in range(2)]
    for rank, made in enumerate(ranks):
        made.bind(part=Holder({"rows": cut(torch.arange(4.0), rank, 2)}))
        made.save(5)
    for made, words in zip(ranks, ("rank 1: .*No space left", "No space left"), strict=True):
        with pytest.raises(UserError, match=words):
            made.finish()
    assert not list(tmp_path.glob("step_*"))


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_every_nth_step_and_the_best_are_kept_beside_the_last(tmp_path: Path) -> None:
    made = LocalCheckpoints(tmp_path, keep=1, strategy=Alone(), keep_every=20, best="val/loss")
    made.bind(part=Holder({"value": 1}))
    for step, value in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 2.0), (25, 2.0), (30, 2.0)):
        made.save(step)
        if made.best_value() is None or value < (made.best_value() or 0):
            made.keep_best(step, value)
            made.finish()
    made.finish()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{s:08d}" for s in (10, 20, 30)]
    assert LocalCheckpoints(tmp_path, keep=1, strategy=Alone(), best="val/loss").best_value() == 1.0
    assert LocalCheckpoints(tmp_path, keep=1, strategy=Alone(), best="val/x0_loss").best_value() is None


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        ModuleState(nn.Linear(2, 3)).load_state_dict(ModuleState(nn.Linear(3, 2)).state_dict())
