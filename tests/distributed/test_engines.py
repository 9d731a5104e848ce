"""Every engine trains as one process does, on worlds of gloo processes on this machine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nai_xl.distributed.fsdp2 import Fsdp2
from nai_xl.distributed.strategy import StepSettings
from nai_xl.memory import process_wide

ROOT = Path(__file__).parents[2]
ZERO = ["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
SHARES = {"ddp": 1, "fsdp2": 1 / 2, "zero2": 1, "zero3": 1 / 2}
CHECKPOINTING = "memory=[sdpa,gradient_checkpointing]"
EIGHT = "optimizer=adamw8bit"
Found = list[list[dict[str, Any]]]  # of world 1, 2 and 4: what each rank has found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Found:
    one = {
        "plain": ["plain", "none"],
        "accumulated": ["accumulated", "none"],
        "frozen": ["frozen", "none", CHECKPOINTING],
        "square": ["continued", ["none"], 10],
        "8bit": ["continued", ["none"], 6, EIGHT],
    }
    two = {f"{engine} plain": ["plain", engine] for engine in ["ddp", "fsdp2", *ZERO]}
    two |= {f"{engine} accumulated": ["accumulated", engine] for engine in ["fsdp2", *ZERO[:1]]}
    two |= {f"{engine} frozen": ["frozen", engine, CHECKPOINTING] for engine in ["fsdp2", *ZERO[1:]]}
    two["square"] = ["continued", ["ddp", "fsdp2", *ZERO, "ddp"], 2]
    two["8bit"], two["refused"] = ["continued", ["ddp", "fsdp2"], 2, EIGHT], ["refused"]
    four = {"8bit": ["further", ["fsdp2"], 2, EIGHT], "plain": ["plain", "hsdp"]}
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "asked.json").write_text(json.dumps([[1, one], [2, two], [4, four]]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/distributed/ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Found = json.loads((folder / "found.json").read_text())
    return found


def agree(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)


def delivers(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    found, expected = ranks[0]["delivered"], alone["delivered"]
    assert found.keys() == expected.keys()
    assert [*found.values()] == pytest.approx([*expected.values()], rel=1e-4, abs=1e-7)
    assert ranks[0]["looked"] == pytest.approx(alone["looked"], rel=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *ZERO])
def test_losses_norms_samples_and_what_is_delivered_are_those_of_one_process(worlds: Found, engine: str) -> None:
    ranks, alone = [rank[f"{engine} plain"] for rank in worlds[1]], worlds[0][0]["plain"]
    agree(ranks, alone)
    delivers(ranks, alone)
    assert all(rank["bytes"] == pytest.approx(alone["bytes"] * SHARES[engine], rel=0.01) for rank in ranks)
    assert all(rank["largest"] == alone["largest"] > 0 for rank in ranks)  # what a report of a fault looks at


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *ZERO])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_and_no_moment(worlds: Found, engine: str) -> None:
    for rank in worlds[1]:
        assert rank[f"{engine} plain"]["spoiled"] in ("nan", "inf")
        assert not rank[f"{engine} plain"]["moved"]


def test_fsdp2_shards_every_parameter_and_gives_a_plain_network_back(worlds: Found) -> None:
    first, second = (rank["fsdp2 plain"] for rank in worlds[1])
    assert first["dtensors"] and second["dtensors"]
    assert first["plain"] and first["delivered"] and not second["delivered"]
    assert first["looked"] == second["looked"]  # every rank evaluates


@pytest.mark.parametrize("engine", ["fsdp2", *ZERO[1:]])
def test_frozen_weights_are_sharded_and_delivered_too_and_blocks_computed_again(worlds: Found, engine: str) -> None:
    ranks, alone = [rank[f"{engine} frozen"] for rank in worlds[1]], worlds[0][0]["frozen"]
    agree(ranks, alone)
    delivers(ranks, alone)
    assert ranks[0]["bytes"] == pytest.approx(alone["bytes"] / 2, rel=0.01)


@pytest.mark.parametrize("engine", ["fsdp2", *ZERO[:1]])
def test_accumulated_gradients_are_those_of_one_process(worlds: Found, engine: str) -> None:
    agree([rank[f"{engine} accumulated"] for rank in worlds[1]], worlds[0][0]["accumulated"])


def test_fsdp2_exchanges_gradients_after_the_last_micro_batch_alone(worlds: Found) -> None:
    for rank in worlds[1]:
        first, second, third = rank["fsdp2 accumulated"]["reductions"]
        assert first == second == 0 < third


def test_a_shard_size_that_does_not_divide_the_processes_is_refused(worlds: Found) -> None:
    assert "distributed.shard_size=3 does not divide the 2 processes" in worlds[1][0]["refused"]["error"]
    assert "distributed.shard_size=null" in worlds[1][0]["refused"]["error"]


def test_a_run_goes_on_from_engine_to_engine_as_if_undisturbed(worlds: Found) -> None:
    found = worlds[1][0]["square"]["losses"]
    assert found == pytest.approx(worlds[0][0]["square"]["losses"][: len(found)], rel=1e-5)


def test_a_run_in_8_bit_goes_on_with_other_cuts(worlds: Found) -> None:
    found = [*worlds[1][0]["8bit"]["losses"], *worlds[2][0]["8bit"]["losses"]]
    assert found == pytest.approx(worlds[0][0]["8bit"]["losses"], rel=1e-4)


def test_two_copies_of_two_shards_are_one_run(worlds: Found) -> None:
    ranks, alone = [rank["plain"] for rank in worlds[2]], worlds[0][0]["plain"]
    agree(ranks, alone)
    delivers(ranks, alone)
    assert all(rank["bytes"] == pytest.approx(alone["bytes"] / 2, rel=0.01) for rank in ranks)
    assert all(rank["spoiled"] == "nan" and not rank["moved"] for rank in ranks)


def test_a_rehearsal_leaves_no_gradient_of_what_is_learned_beside_the_network() -> None:
    module, learned = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(()))
    with process_wide.restored():
        strategy = Fsdp2().start("no")
        names = dict(module.named_parameters())
        wrapped = strategy.wrap(module, names, lambda p: torch.optim.SGD([*p.values(), learned]), StepSettings())
        first = next(iter(names.values()))
        strategy.rehearse(wrapped.module, lambda: learned * wrapped.module(torch.ones(1, 4)).sum(), first)
        assert all(p.grad is None for p in [*wrapped.parameters.values(), *module.parameters(), learned])
