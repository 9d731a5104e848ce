"""What a run reports: means by brute force, and refusal of what is not finite."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nai_xl.engine.checkpoint import LocalCheckpoints
from nai_xl.engine.meter import Meter, peak_memory_gib
from nai_xl.engine.nonfinite import Fault
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch, Losses
from nai_xl.model.flops import training_flops
from nai_xl.model.tiny import tiny_sdxl
from tests.conftest import Alone


def alone(rows: Tensor) -> Tensor:
    return rows


def doubled(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])


def add(meter: Meter, losses: list[float], t: list[int], items: list[int] | None = None, waited: float = 0.0) -> None:
    empty, size = torch.zeros(len(t)), len(t)
    item = torch.tensor(items or list(range(size)))
    batch = Batch(empty, empty, empty, empty, empty, empty, item, empty, empty)
    batch.position = torch.arange(size)
    meter.add(Losses(torch.tensor(losses), torch.tensor(t)), batch, waited=waited)


def filled(seed: int = 0, **kwargs: bool) -> tuple[Meter, np.ndarray, np.ndarray, np.ndarray]:
    """A meter after three steps of unequal micro-batches, and all that went in."""
    draw = np.random.default_rng(seed)
    meter = Meter(1000, gather=alone, **kwargs)
    losses, t, norms = draw.random(22).astype("f4"), draw.integers(0, 1000, 22), draw.random(3).astype("f4")
    for start, stop in ((0, 4), (4, 8), (8, 16), (16, 22)):
        add(meter, losses[start:stop].tolist(), t[start:stop].tolist())
    for norm in norms:
        meter.add_grad_norm(torch.tensor(norm))
    return meter, losses, t, norms


def without_times(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith("perf/")}


def test_reported_means_and_bands_are_those_of_everything_added() -> None:
    meter, losses, t, norms = filled()
    values = meter.read(lr=0.25)
    assert values["train/loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert values["train/grad_norm"] == pytest.approx(norms.mean(), rel=1e-6)
    assert values["train/lr"] == 0.25
    for low in (0, 250, 500, 750):
        inside = losses[(t >= low) & (t < low + 250)]
        assert values[f"train/loss_band_{low}_{low + 250}"] == pytest.approx(inside.mean(), rel=1e-6)


def test_bands_include_their_lower_edge_and_are_left_out_when_empty() -> None:
    meter = Meter(1000, gather=alone)
    add(meter, [1.0, 2.0, 4.0], [0, 250, 999])
    meter.add_grad_norm(torch.tensor(1.0))
    bands = {name: value for name, value in meter.read(lr=1).items() if "band" in name}
    assert bands == {"train/loss_band_0_250": 1, "train/loss_band_250_500": 2, "train/loss_band_750_1000": 4}


def test_next_report_begins_anew() -> None:
    meter, *_ = filled()
    meter.read(lr=1)
    add(meter, [7.0], [3])
    meter.add_grad_norm(torch.tensor(2.0))
    values = meter.read(lr=1)
    assert (values["train/loss"], values["train/grad_norm"]) == (7, 2)


def test_equal_rows_of_a_second_process_leave_the_means_as_they_were() -> None:
    meter, *_ = filled()
    expected = without_times(meter.read(lr=1))
    meter, *_ = filled()
    meter.gather = doubled
    assert without_times(meter.read(lr=1)) == pytest.approx(expected)


def test_rates_leave_out_pauses_and_count_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for world, images in ((1, 6), (2, 12)):
        meter = Meter(1000, gather=alone, world=world)
        for _ in range(2):
            now[0] += 2.0
            add(meter, [1.0] * 3, [0] * 3, waited=0.5)
        with meter.paused():
            now[0] += 1000.0
        meter.add_grad_norm(torch.tensor(1.0))
        values = meter.read(lr=1)
        assert values["perf/images_per_second"] == pytest.approx(images / 4)
        assert values["perf/data_wait"] == pytest.approx(1 / 4)


def shaped(images: int, height: int, width: int, tokens: int = 77) -> Batch:
    """A micro-batch of the tiny model's on a canvas of height x width pixels."""
    empty, latents = torch.zeros(images), torch.randn(images, 4, height // 8, width // 8)
    context, item = torch.randn(images, tokens, 160), torch.arange(images)
    return Batch(latents, context, torch.randn(images, 96), torch.zeros(images, 6), empty, item, item, empty, latents)


def test_tflops_are_those_that_torch_counts_in_the_forward_passes_of_every_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = tiny_sdxl(seed=0).unet
    unet.set_attn_processor(AttnProcessor())  # plain products: torch does not count its fused attention on a CPU
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter(1000, gather=alone, flops=partial(flops_of, unet), peak_tflops=0.5)
    batches = [shaped(2, 64, 64), shaped(1, 64, 96), shaped(3, 96, 64), shaped(2, 64, 64, tokens=154)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            condition = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
            unet(batch.latents, batch.position, batch.context, added_cond_kwargs=condition)
    for batch in batches:
        now[0] += 0.25
        t = torch.zeros(len(batch))
        meter.add(Losses(t, t), batch, waited=0.0)
    meter.add_grad_norm(torch.tensor(1.0))
    values = meter.read(lr=1)
    assert values["perf/tflops"] * 1e12 == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)
    assert values["perf/mfu"] == pytest.approx(values["perf/tflops"] / 0.5)


def flops_of(unet: UNet2DConditionModel, height: int, width: int, tokens: int) -> int:
    return training_flops(unet, height, width, tokens=tokens)


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=8
    ),
    st.integers(1, 4),
)
def test_tflops_of_a_linear_layer_are_its_closed_form(shapes: list[tuple[int, int, int, int]], world: int) -> None:
    """2 x cells x in x out FLOPs forward for a layer applied at every latent cell and token; counted a device."""
    asked = []

    def flops(height: int, width: int, tokens: int) -> int:
        asked.append((height, width, tokens))
        return 3 * 2 * ((height // 8) * (width // 8) + tokens) * 4 * 5

    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr("time.perf_counter", lambda: now[0])
        meter = Meter(1000, gather=alone, world=world, flops=flops)
        for images, height, width, chunks in shapes:
            t = torch.zeros(images)
            batch = shaped(images, 8 * height, 8 * width, tokens=77 * chunks)
            meter.add(Losses(t, t), batch, waited=0.0)
        meter.add_grad_norm(torch.tensor(1.0))
        now[0] += 2.0
        values = meter.read(lr=1)
    cells = sum(images * (height * width + 77 * chunks) for images, height, width, chunks in shapes)
    assert values["perf/tflops"] == pytest.approx(3 * 2 * cells * 4 * 5 / 2.0 / 1e12)
    assert "perf/mfu" not in values
    assert len(asked) == len(set(asked))


def test_counting_flops_takes_no_time_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(height: int, width: int, tokens: int) -> int:
        now[0] += 1000.0
        return 10**12

    meter = Meter(1000, gather=alone, flops=slow)
    for step in (1, 2):
        batch, t = shaped(4, 64, 64), torch.zeros(4)
        meter.add(Losses(t, t), batch, waited=0.0)
        meter.add_grad_norm(torch.tensor(1.0))
        now[0] += 2.0
        # the first report is read as at the end of a run that is continued: it keeps its interval
        values = meter.read(lr=1, clear=False)
        assert values["perf/images_per_second"] == pytest.approx(2)
        assert values["perf/tflops"] == pytest.approx(2), step


def test_peak_memory_is_the_largest_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, *_ = filled()
    monkeypatch.setattr("nai_xl.engine.meter.peak_memory_gib", lambda device: 3.0)
    meter.gather = lambda rows: torch.cat([rows, 2 * rows, rows])
    assert meter.read(lr=1)["perf/peak_memory_gib"] == 6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the oracle is Linux's")
def test_peak_memory_of_a_cpu_is_that_of_the_whole_process() -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    # the kernel keeps the counter by thread and brings it up to date now and then
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kilobytes / 2**20, rel=0.02)


def test_peak_memory_of_a_gpu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * 2**29)
    assert peak_memory_gib(torch.device("cuda")) == 1.5


def test_resumed_run_reports_the_means_of_the_uninterrupted_one(tmp_path: Path) -> None:
    meter, *_ = filled()
    saved = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    saved.bind(meter=meter)
    saved.save(1)
    saved.finish()
    other = Meter(1000, gather=alone)
    fresh = LocalCheckpoints(tmp_path, keep=1, strategy=Alone())
    fresh.bind(meter=other)
    fresh.load_latest()
    assert without_times(other.read(lr=1)) == without_times(meter.read(lr=1))


def test_every_rank_gets_its_own_rows_back() -> None:
    saving = Meter(1000, gather=lambda rows: torch.cat([rows, rows + 1]), world=2)
    add(saving, [1.0, 2.0], [10, 20])
    for rank in (0, 1):
        back = Meter(1000, gather=alone, rank=rank, world=2)
        back.load_state_dict(saving.state_dict())
        assert back.rows[0].tolist() == [
            [1 + rank, 2 + rank],
            [10 + rank, 20 + rank],
            [rank, 1 + rank],
            [rank, 1 + rank],
        ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_refused_naming_its_images(bad: float) -> None:
    meter = Meter(1000, gather=alone)
    add(meter, [1.0, bad, 2.0], [0, 1, 2], items=[40, 123456789, 42])
    add(meter, [bad, 1.0], [0, 1], items=[17, 43])
    meter.add_grad_norm(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"number 17 of .*number 123456789 of .*optimizer\.lr"):
        meter.read(lr=1)


def test_gradient_that_is_not_finite_is_refused_unless_a_scaler_is_looking_for_its_scale() -> None:
    meter, *_ = filled()
    meter.add_grad_norm(torch.tensor(math.inf))
    with pytest.raises(UserError, match="the gradient is not finite"):
        meter.read(lr=1)
    meter, _, _, norms = filled(refuse_gradients=False)
    meter.add_grad_norm(torch.tensor(math.inf))
    assert meter.read(lr=1)["train/grad_norm"] == pytest.approx(norms.mean(), rel=1e-6)


def test_what_is_left_out_counts_in_no_mean_and_is_found_once() -> None:
    faults = []
    meter = Meter(1000, gather=alone, images_per_step=2, on_fault=lambda fault, left_out: faults.append(fault))
    add(meter, [1.0, math.nan], [10, 20])
    meter.add_grad_norm(torch.tensor(math.nan), 1)
    saved = meter.state_dict()
    assert [fault.steps for fault in faults] == [[1]] and faults[0].samples == [(1, 1, 20.0)]
    assert all(row.isfinite().all() for row in saved["rows"]) and saved["norms"] == []
    again = Meter(1000, gather=alone, images_per_step=2, on_fault=meter.on_fault)
    again.load_state_dict(saved)
    for found in (meter, again):
        add(found, [4.0], [600])
        found.add_grad_norm(torch.tensor(2.0), 2)
        values = found.read(lr=1)
        assert (values["train/loss"], values["train/grad_norm"], values["train/skipped_steps"]) == (2.5, 2, 1)
        assert values["train/loss_band_0_250"] == 1 and values["train/loss_band_500_750"] == 4
    assert len(faults) == 1


def test_a_report_of_steps_that_were_all_left_out_has_no_loss() -> None:
    meter = Meter(1000, gather=alone, on_fault=lambda fault, left_out: None)
    add(meter, [math.inf], [3])
    meter.add_grad_norm(torch.tensor(math.inf), 1)
    values = meter.read(lr=1)
    assert "train/loss" not in values and values["train/skipped_steps"] == 1


def test_a_scaler_that_never_finds_its_scale_ends_the_run_across_reports_and_restarts() -> None:
    meter = Meter(1000, gather=alone, refuse_gradients=False)
    for step in range(1, 60):
        add(meter, [1.0], [0])
        meter.add_grad_norm(torch.tensor(1.0 if step == 5 else math.inf), step)
        if step == 46:  # 41 in a row
            with pytest.raises(UserError, match="step 46: the gradient is not finite"):
                meter.read(lr=1)
            break
        if step % 10 == 0:
            meter.read(lr=1)
        if step == 20:
            saved, meter = meter.state_dict(), Meter(1000, gather=alone, refuse_gradients=False)
            meter.load_state_dict(saved)
    assert step == 46


@pytest.mark.parametrize(
    ("losses", "since"),
    [
        ([1.0, 1e5, 1e20], 2),
        ([1.0, 0.8, 1.2, 0.9] * 10 + [20.0, 400.0], 41),
        ([1.0, 0.05, 2.0, 0.9] * 10, None),  # noise
        ([3.0], None),
        ([-0.5, -0.6, -0.4, -0.55, 40.0, 60.0], 5),  # a learned weighting's
    ],
)
def test_growth_is_dated_from_the_last_usual_loss(losses: list[float], since: int | None) -> None:
    found = Fault((), [9], dict(enumerate(losses, 1))).growth()
    assert (found is None) if since is None else f"since step {since}, from" in str(found)


def test_losses_are_kept_without_their_graph() -> None:
    meter = Meter(1000, gather=alone)
    weight = torch.ones(2, requires_grad=True)
    empty = torch.zeros(2)
    batch = Batch(empty, empty, empty, empty, empty, torch.arange(2), torch.arange(2), empty, empty)
    meter.add(Losses(weight * 2, torch.tensor([0, 1])), batch, waited=0.0)
    assert not any(row.requires_grad for row in meter.rows)
