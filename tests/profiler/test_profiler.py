"""The profiler's window, what it leaves behind, and that its advice can be typed."""

import gzip
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

from nai_xl import config
from nai_xl.engine.meter import Meter
from nai_xl.interfaces import Batch
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import Sdpa
from nai_xl.profiler.advice import Setup, advice
from nai_xl.profiler.page import Page
from nai_xl.profiler.profiler import Profiler
from nai_xl.profiler.trace import DATA, PAUSED, STEP, Cost, Summary
from nai_xl.tracker.jsonl import NoTracker

CPU = torch.device("cpu")
SETUP = Setup(batch_size=8, grad_accum=1, workers=0, mixed_precision="bf16", memory={"sdpa": Sdpa()})
BOUNDS = {"compute-bound": 0.7, "memory-bound": 0.25, "communication": 0.0, "data wait": 0.01, "idle": 0.04}
WELL = Summary(6, 0.5, BOUNDS, {("compute-bound", "gemm"): 0.7}, [], 5000, 4000, {}, {}, False)


class Remembering(NoTracker):
    def __init__(self) -> None:
        self.artifacts: list[Path] = []

    def artifact(self, path: Path) -> None:
        self.artifacts.append(path)


def batches(count: int) -> Iterator[Batch]:
    for place in range(count):
        t = torch.full((3,), place)
        yield Batch(t, t, t, t, t, t, t, t, t)


def profiled(folder: Path, steps: int, accumulate: int = 2, **window: int) -> tuple[list[int], list[str], Remembering]:
    """A loop of `steps` steps, an evaluation after each: batches seen, text shown, tracker."""
    seen: list[int] = []
    shown: list[RenderableType] = []
    tracker = Remembering()
    profiler = Profiler(steps=steps, dir=folder, device=CPU, setup=SETUP, show=shown.append, tracker=tracker, **window)
    meter = Meter(1000, gather=lambda rows: rows)
    weight = torch.randn(16, 16)
    watched = profiler.watch(batches(steps * accumulate))
    with profiler:
        for step in range(1, steps + 1):
            for _ in range(accumulate):
                seen.append(int(next(watched).position[0]))
                torch.mm(weight, weight)
            with meter.paused():
                profiler.step(step)
                torch.bmm(weight[None], weight[None])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    texts = []
    for content in shown:
        console.print(content)
        texts.append(console.export_text())
    return seen, texts, tracker


def events(folder: Path) -> list[dict[str, object]]:
    with gzip.open(next(folder.glob("*.json.gz")), "rt") as file:
        return json.load(file)["traceEvents"]


def test_the_window_is_recorded_and_the_rest_left_alone(tmp_path: Path) -> None:
    seen, texts, tracker = profiled(tmp_path / "profile", 12, wait=2, warmup=1, active=3)
    assert seen == list(range(24))
    names = [event["name"] for event in events(tmp_path / "profile")]
    assert names.count(STEP) == 3 and names.count(DATA) == names.count("aten::mm") == 6
    assert names.count(PAUSED) == 3  # that of the step before the window, and all but the last of it
    assert [path.name for path in tracker.artifacts] == ["trace_step_00000006.json.gz", "summary_step_00000006.txt"]
    text = tracker.artifacts[1].read_text()
    assert texts == [text]
    assert "profile of steps 4 to 6" in text and re.search(r"^mm .* 2 +gemm *$", text, re.MULTILINE)
    assert "bmm" not in text  # an evaluation's


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_window_fits_into_short_runs(tmp_path: Path, steps: int) -> None:
    seen, texts, _ = profiled(tmp_path / "profile", steps, accumulate=1)
    assert seen == list(range(steps)) and len(texts) == 1
    recorded = [event["name"] for event in events(tmp_path / "profile")].count(STEP)
    assert recorded == min(6, steps - 2 * min(2, steps // 4))


def test_a_run_stopped_within_the_window_tells_what_it_saw_and_a_failed_one_nothing(tmp_path: Path) -> None:
    for error, told in ((None, 1), (RuntimeError("power cut"), 0)):
        shown: list[RenderableType] = []
        profiler = Profiler(
            steps=100, dir=tmp_path / str(told), device=CPU, setup=SETUP, show=shown.append, tracker=NoTracker()
        )
        watched = profiler.watch(batches(100))
        profiler.__enter__()
        for step in range(1, 7):
            next(watched)
            torch.ones(3) + 1
            profiler.step(step)
        profiler.__exit__(type(error) if error else None, error, None)
        assert len(shown) == told and (tmp_path / str(told)).exists() == bool(told)


def test_a_run_without_steps_left_is_let_be(tmp_path: Path) -> None:
    assert profiled(tmp_path / "profile", 0)[1] == [] and not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("found", "setup", "device", "expected"),
    [
        ({"data wait": 0.2}, {}, "gpu", "run.workers=4"),
        ({"data wait": 0.2}, {"workers": 6}, "gpu", "run.workers=12"),
        ({"idle": 0.3}, {}, "gpu", "run.batch_size=16"),
        ({"idle": 0.3}, {}, "gpu", "memory=[sdpa,compile]"),
        ({"host": 0.3}, {}, "cpu", "run.batch_size=16"),
        ({"memory-bound": 0.5}, {}, "gpu", "memory=[sdpa,compile]"),
        ({"softmax": 0.1}, {"memory": {}}, "gpu", "memory=[sdpa]"),
        ({"optimizer": 0.2}, {}, "gpu", "run.grad_accum=2"),
        ({"copies": 0.2}, {}, "gpu", "memory=[sdpa,bf16_weights]"),
        ({"copies": 0.2}, {}, "gpu", "memory=[sdpa,channels_last]"),
        ({"communication": 0.2}, {"grad_accum": 2}, "gpu", "run.grad_accum=4"),
        ({"compute-bound": 0.8}, {"mixed_precision": "no"}, "gpu", "precision=bf16"),
        ({"waits": 1.0}, {}, "gpu", "optimizer.fused=true"),
        ({"compiling": 1.0}, {}, "gpu", "profile.wait=50"),
    ],
)
def test_what_costs_too_much_is_told_with_an_override(
    found: dict[str, float], setup: dict[str, object], device: str, expected: str
) -> None:
    bounds = {**BOUNDS, **{name: share for name, share in found.items() if name in (*BOUNDS, "host")}}
    kinds = {("memory-bound", name): share for name, share in found.items() if name not in bounds}
    summary = replace(WELL, bounds=bounds, kinds=kinds, compiling="compiling" in found)
    if "waits" in found:
        summary = replace(summary, waits={"aten::is_nonzero": found["waits"]})
    chosen = replace(SETUP, **setup)
    said = " ".join(advice(summary, chosen, on_gpu=device == "gpu"))
    assert expected in said
    overrides = [o.strip("'") for o in re.findall(r"'[\w.]+=[^']*'|\b[a-z]+(?:\.[a-z_]+)?=\w+", said)]
    assert overrides and any(expected == override for override in overrides)
    available = {path.stem for path in (config.conf_dir() / "memory").glob("*.yaml")}
    for override in overrides:
        # memory actions of other layers may not be installed; those that are must compose
        actions = set(re.findall(r"\w+", override.partition("=")[2])) if override.startswith("memory=") else set()
        if actions <= available:
            config.check(config.compose(["debug=profile", override]))


def test_nothing_is_advised_where_nothing_stands_out_or_all_is_chosen() -> None:
    assert advice(WELL, SETUP, on_gpu=True) == [
        "Nothing stands out: 70% is matrix products, convolutions and attention, as it should be."
    ]
    chosen = config.compose(["memory=[sdpa,compile,bf16_weights,channels_last]"]).memory
    everything = replace(SETUP, memory=config.build(chosen))
    slow = replace(WELL, bounds={**BOUNDS, "memory-bound": 0.6, "idle": 0.3}, kinds={("memory-bound", "copies"): 0.3})
    assert not re.search(r"memory=", " ".join(advice(slow, everything, on_gpu=True)))
    assert "does not let torch's profiler" in advice(replace(WELL, kernels=0), SETUP, on_gpu=True)[0]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_page_fits_its_screen_and_cuts_no_number(width: int) -> None:
    costs = [
        Cost("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "compute-bound", "attention", 123.4, 22),
        Cost("aten::mm", "compute-bound", "gemm", 1234.5, 4321),
    ]
    summary = replace(WELL, costs=costs, reads={"aten::_fused_adamw_": 412.7}, waits={"aten::item": 1})
    page = Page(summary, ["Do this: run.workers=4."], 10, 48, 1.25, Path("outputs/run/profile/trace.json.gz"))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(page.rendered())
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    for number in ("1,234.50", "4,321", "123.40", "412.7", "70.0%", "16.0 images/s", "5,000", "4,000", "1.25 GiB"):
        assert number in " ".join(text.split()), number
    assert math.isclose(len(re.findall("█", text)), 20, abs_tol=2)


def test_actions_of_other_names_are_known_by_what_they_do() -> None:
    class Own(MemoryAction):
        compiles = True
        weights_in = torch.bfloat16
        attention = "own"  # type: ignore[assignment]

    kinds = {("memory-bound", "copies"): 0.3, ("memory-bound", "softmax"): 0.3}
    slow = replace(WELL, bounds={**BOUNDS, "memory-bound": 0.6, "idle": 0.3}, kinds=kinds)
    plain, own = (replace(SETUP, memory=memory) for memory in ({}, {"own": Own()}))
    advised = [set(re.findall(r"memory=\[([^]]*)\]", " ".join(advice(slow, s, on_gpu=True)))) for s in (plain, own)]
    assert advised == [{"compile", "sdpa", "bf16_weights", "channels_last"}, {"own,channels_last"}]
