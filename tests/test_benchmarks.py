"""The benchmarks still run and count what they say. No time is asserted."""

import importlib.util
import json
import math
from mmap import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.compare.statistics.crossed import critical_t, crossed
from nai_xl.compare.statistics.paired import bootstrap

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark by its name, imported as `python benchmarks/NAME.py` finds it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_spread_is_numpys(load: Any) -> None:
    spread = load("common").spread

    @given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
    def agrees(times: list[float]) -> None:
        expected = dict(zip(("median", "p10", "p90"), np.percentile(times, (50, 10, 90)), strict=True))
        assert spread(times) == pytest.approx({**expected, "mean": np.mean(times)}, rel=1e-9, abs=1e-9)

    agrees()


def test_arms_take_turns_and_the_first_round_is_thrown_away(load: Any) -> None:
    turns: list[str] = []

    def arm(name: str) -> Any:
        return lambda: turns.append(name) or [float(len(turns))]  # type: ignore[func-returns-value]

    found = load("common").interleave({"a": arm("a"), "b": arm("b"), "c": arm("c")}, 2)
    assert "".join(turns) == "abca" * 3
    assert found == {"a": [[5], [9]], "b": [[6], [10]], "c": [[7], [11]], "a again": [[8], [12]]}


def test_the_clock_does_not_count_what_is_inside_twice(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("common")
    now = iter([0.0, 2.0, 5.0, 11.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(now))
    clock = common.Clock()
    with clock("outer"), clock("inner"):
        pass
    assert clock.seconds == {"inner": 3.0, "outer": 8.0}


def test_overhead_compares_two_loops_that_compute_the_same(load: Any, tmp_path: Path) -> None:
    found = load("overhead").main(["--steps=2", "--rounds=1", "--threads=1", "--batch=1", f"--out={tmp_path}"])
    assert max(found["agree"].values()) < 1e-5
    record = json.loads((tmp_path / "overhead.json").read_text())
    assert record["rows"][0]["arm"] == "bare" and len(record["rows"]) == 5
    assert all(math.isfinite(row["overhead ms"]) for row in record["rows"])
    assert record["versions"]["torch"] == torch.__version__
    parts = {row["part"] for row in json.loads((tmp_path / "overhead_parts.json").read_text())["rows"]}
    assert {"batches", "loss", "module", "meter.add", "update", "strategy.backward"} <= parts
    assert "| bare |" in (tmp_path / "overhead.md").read_text()


def test_ops_are_those_of_the_bare_loop(load: Any) -> None:
    """Inside the network both ask for the same; around it ours may ask for a little more."""
    ops = load("ops")
    ours, bare = ops.our_steps("tiny", 64, 1, [], 2), ops.bare_steps("tiny", 64, 1, "no", 2)
    assert ours.ops["forward"] == bare.ops["forward"]
    heavy = ("convolution_backward", "addmm", "mm", "bmm")
    assert [ours.ops["backward"][name] for name in heavy] == [bare.ops["backward"][name] for name in heavy]
    assert ours.ops["update"]["_fused_adamw_"] == bare.ops["update"]["_fused_adamw_"] == 2
    assert sum(bare.waits.values()) == 0


def test_waits_are_seen(load: Any) -> None:
    """Every kind of read of a tensor's value, once; what needs no value is none."""
    ops = load("ops")
    x = torch.arange(4.0)
    reads = [
        lambda: x[0].item(),
        lambda: bool(x[0]),
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        lambda: x.unique(),
    ]
    for read in reads:
        count = ops.Count()
        with ops.HostReads(count), count:
            x[torch.tensor([0, 1])].clamp(min=1).sum().isfinite()
            assert count.waits.total() == 0
            read()
        assert count.waits.total() == 1, count.waits
        assert all("test_benchmarks.py:" in what for what in count.waits)


def test_out_of_memory_is_a_result(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet: ModuleType = load("unet")

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(unet, "measure", full)
    assert unet.one_job({"arm": "bare"}) == {"failed": "out of memory"}


def test_a_speed_is_measured_by_the_runs_own_objects(load: Any) -> None:
    found = load("unet").measure("tiny", "memory=[sdpa,gradient_checkpointing]", 1, 64, 1, 2)
    assert found["images/s"] == pytest.approx(1000 / found["median ms"])
    flops = load("nai_xl.model.flops").training_flops(load("nai_xl.model.tiny").tiny_sdxl(seed=0).unet, 64, 64)
    assert found["TFLOP/s"] == pytest.approx(flops * found["images/s"] / 1e12)


@pytest.mark.parametrize("shape", [(3, 1), (3, 16), (5, 40), (12, 4)])
def test_the_simulated_p_is_that_of_compare(load: Any, shape: tuple[int, int]) -> None:
    """verdicts.py computes it for many tables at once, on fewer nodes."""
    verdicts = load("verdicts")
    tables = verdicts.differences(verdicts.normal, (1, 1, 1), 60, *shape)
    found = verdicts.spreads(tables)
    fast = verdicts.p_of_today(found, found.mean)
    slow = [crossed(table).p(float(table.mean())) for table in tables]
    assert fast == pytest.approx(slow, rel=0.02, abs=1e-5)


def test_the_simulations_have_their_rows(load: Any, tmp_path: Path) -> None:
    verdicts = load("verdicts")
    verdicts.main(["--draws", "20", "--out", str(tmp_path)])
    rows = {name: json.loads((tmp_path / f"verdicts_{name}.json").read_text())["rows"] for name in verdicts.TABLES}
    assert {row["values"] for row in rows["intervals"]} >= {"normal", "t3", "mixture", "errors", "shares of 8"}
    assert all(0 <= row["any false verdict today"] <= 1 for row in rows["family"])
    assert all(row["called equal at the margin"] <= row["called equal when equal"] for row in rows["equal"])


def test_stored_intervals_give_back_their_mean_squares() -> None:
    """experiments/recompute.py, on a table whose mean squares are known."""
    spec = importlib.util.spec_from_file_location("recompute", BENCHMARKS.parent / "experiments" / "recompute.py")
    assert spec is not None and spec.loader is not None
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    random = np.random.default_rng(0)
    table = random.normal(size=(5, 1)) + 0.5 * random.normal(size=(1, 30)) + random.normal(size=(5, 30))
    known = crossed(table)
    of_items = known.of_items - known.of_both
    df = known.variance**2 / (known.of_seeds**2 / 4 + of_items**2 / 29)
    half = critical_t(df) * known.variance**0.5
    low, high = bootstrap(table, 20_000)
    row = {"seeds": "0 1 2 3 4", "items": "30", "df": df, "low": -half, "high": half}
    row |= {"bootstrap_low": low, "bootstrap_high": high}
    found = recompute.mean_squares(row)
    best = min(found, key=lambda one: abs(one.of_seeds - known.of_seeds))
    assert best.of_seeds == pytest.approx(known.of_seeds) and best.of_items - best.of_both == pytest.approx(of_items)
    assert max(one.p(2.0) for one in found) >= 0.98 * known.p(2.0)


@pytest.mark.parametrize("count", [1, 50])
def test_generated_indexes_are_in_order_and_their_keys_are_found_in_the_generated_cache(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    made, now = load("data_made"), load("data_now")
    for name, value in {"CHUNK": 8, "READ": 8, "READ_SMALL": 16}.items():
        monkeypatch.setattr(made, name, value)
        monkeypatch.setattr(now, name, value)
    made.write_index(tmp_path / "index.arrow", count)
    index = now.opened(tmp_path / "index.arrow")
    assert len(index.items) == len({item.content for item in index.items}) == count
    assert index.items.order().tolist() == list(range(count))
    now.fill(tmp_path / "index.arrow", tmp_path)
    cache, latents = now.DiskCache(tmp_path / "cache"), now.placed(index)
    assert not cache.missing(now.keys(latents)).any()
    assert all(cache.get(latents[number][0].key) is not None for number in now.read_first(now.sampler, latents, 8))


def test_growth_is_the_exponent_between_sizes(load: Any) -> None:
    assert load("data").growth({10: 2.0, 1000: 200.0, 100: 2.0, 10_000: 20_000.0}) == "0.0 2.0 2.0"


def test_memory_that_is_written_is_private(load: Any) -> None:
    memory = load("resources").memory
    fresh = np.frombuffer(mmap(-1, 50_000_000), np.uint8)  # and nothing that was used and freed before
    before = memory()
    fresh[:] = 1
    assert (memory() - before).private == pytest.approx(fresh.nbytes, rel=0.1)
