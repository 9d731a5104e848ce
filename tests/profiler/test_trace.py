"""Reading traces: made by hand with known answers, and torch's own with torch's own sums as the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function

from nai_xl.profiler import intervals
from nai_xl.profiler.trace import DATA, PAUSED, STEP, classify, summarise

Event = dict[str, Any]


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1, **args: int) -> Event:
    named = {key.replace("_", " "): value for key, value in args.items()}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start, "args": named}


def mark(name: str, start: float, end: float) -> Event:
    return event(name, start, end, "user_annotation")


def kernel(name: str, start: float, end: float, operator: int, stream: int = 7) -> Event:
    return event(name, start, end, "kernel", tid=stream, External_id=operator)


ON_CPU = [
    mark(STEP, 0, 1000),
    mark(DATA, 0, 100),
    event("aten::stack", 10, 90),  # the loader's: part of the wait
    event("aten::linear", 100, 500),
    event("aten::addmm", 150, 450),
    event("aten::copy_", 160, 200),
    event("autograd::engine::evaluate_function: MulBackward0", 500, 700),
    mark("Optimizer.step#AdamW.step", 510, 690),
    event("aten::mul", 520, 680),
    event("aten::item", 710, 730),
    event("aten::_local_scalar_dense", 712, 728),
    mark(PAUSED, 800, 900),
    event("aten::mm", 810, 890),  # of an evaluation
    mark(STEP, 2000, 2100),
    mark(DATA, 2000, 2000),
    event("aten::_fused_adamw_", 2000, 2100),
    event("aten::item", 2010, 2020),
    event("aten::_local_scalar_dense", 2011, 2019),
    event("aten::mm", 1200, 1900),  # between the steps
    event("aten::mm", 300, 900, tid=99),  # of a thread that has no part in training
]


def test_a_trace_of_the_cpu_is_divided_among_operators_waiting_and_the_host() -> None:
    found = summarise(ON_CPU)
    assert found.steps == 2 and found.seconds == pytest.approx(1000e-6 / 2)
    # of 1000 us that are neither pause nor gap: linear 100 + addmm 260; copy_ 40 + mul 160 + adamw 90; data 100
    assert found.bounds == pytest.approx(
        {"compute-bound": 0.36, "memory-bound": 0.29, "communication": 0, "data wait": 0.1, "host": 0.25}
    )
    own = {cost.name.removeprefix("aten::"): (cost.kind, cost.ms * 2000, cost.calls * 2) for cost in found.costs}
    assert own == {
        "addmm": ("gemm", pytest.approx(260), 1),
        "mul": ("elementwise", pytest.approx(160), 1),
        "linear": ("gemm", pytest.approx(100), 1),
        "_fused_adamw_": ("optimizer", pytest.approx(90), 1),
        "copy_": ("copies", pytest.approx(40), 1),
    }
    assert [cost.ms for cost in found.costs] == sorted((cost.ms for cost in found.costs), reverse=True)
    assert found.operators == 2 and found.kernels == 0  # linear, mul, item; _fused_adamw_: four in two steps
    assert found.reads == {"aten::item": 0.5, "aten::_fused_adamw_": 0.5} and found.waits == {}


ON_GPU = [
    mark(STEP, 0, 1000),
    mark(DATA, 0, 300),
    event("aten::addmm", 300, 310, External_id=1),
    event("aten::native_group_norm", 310, 320, External_id=2),
    event("aten::silu", 320, 330, External_id=3),
    event("aten::is_nonzero", 900, 960, External_id=4),
    event("aten::item", 901, 959),
    event("aten::_local_scalar_dense", 902, 958, External_id=5),
    event("cudaStreamSynchronize", 910, 957, "cuda_runtime"),
    event("cudaLaunchKernel", 301, 305, "cuda_runtime"),
    kernel("sm90_something_new", -60, 40, 8),  # ends what a step before has asked for: its middle is outside
    kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN", 310, 500, 1),
    kernel("void at::native::RowwiseMomentsCUDAKernel<float>", 500, 600, 2),
    kernel("void at::native::vectorized_elementwise_kernel<4, silu>", 550, 650, 3, stream=8),
    event("Memcpy DtoH (Device -> Pageable)", 940, 950, "gpu_memcpy", 7, External_id=5),
]


def test_a_trace_of_a_gpu_is_divided_by_what_the_device_did() -> None:
    found = summarise(ON_GPU)
    assert found.kernels == 4 and found.operators == 4
    # busy 310..650 and 940..950, of which 10 us more than the clock by two streams: 350 of 400 us of kernels
    scale = 350 / 400
    assert found.bounds == pytest.approx(
        {
            "compute-bound": 0.19 * scale,
            "memory-bound": 0.21 * scale,
            "communication": 0,
            "data wait": 0.3,
            "idle": 0.35,
        }
    )
    assert {cost.name: cost.kind for cost in found.costs} == {
        "aten::addmm": "gemm",
        "aten::native_group_norm": "norm",
        "aten::silu": "elementwise",
        "aten::_local_scalar_dense": "copies",
    }
    assert found.reads == {"aten::is_nonzero": 1} and found.waits == {"aten::is_nonzero": 1}


def test_waiting_for_data_costs_nothing_while_the_device_works() -> None:
    busy = [mark(STEP, 0, 100), mark(DATA, 0, 80), kernel("gemm", 0, 60, 1), kernel("gemm", 80, 100, 1)]
    assert summarise(busy).bounds == pytest.approx(
        {"compute-bound": 0.8, "memory-bound": 0, "communication": 0, "data wait": 0.2, "idle": 0}
    )


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        summarise([event("aten::mm", 0, 1)])


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        # kernels as CUDA 12 and 13, cuDNN 9, CUTLASS, Triton and ATen name them
        (["sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64"], "compute conv"),
        (["void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "aten::cudnn_convolution"], "memory copies"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"], "compute attention"),
        (["void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel"], "compute attention"),
        (["fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)"], "compute attention"),
        (["ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nt"], "compute gemm"),
        (["void at::native::(anonymous)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"], "memory optimizer"),
        (["triton_red_fused_native_group_norm_silu_7"], "memory norm"),
        (["triton_poi_fused_convolution_add_mm_3"], "memory elementwise"),
        (["triton_tem_fused_addmm_12"], "compute gemm"),
        (["void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>"], "memory copies"),
        (["ncclDevKernel_AllReduce_Sum_f32_RING_LL"], "communication communication"),
        (["Memset (Device)"], "memory copies"),
        (["new_kernel_of_tomorrow", "aten::mm"], "compute gemm"),
        (["new_kernel_of_tomorrow", "mylib::thing"], "memory other"),
        # operators
        (["aten::baddbmm"], "compute gemm"),
        (["aten::_scaled_mm"], "compute gemm"),
        (["aten::convolution_backward"], "compute conv"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu_backward"], "compute attention"),
        (["aten::mul"], "memory elementwise"),
        (["aten::addcmul_"], "memory elementwise"),
        (["aten::sum"], "memory elementwise"),
        (["aten::native_layer_norm_backward"], "memory norm"),
        (["aten::_to_copy"], "memory copies"),
        (["aten::_foreach_lerp_"], "memory optimizer"),
        (["aten::_foreach_norm"], "memory optimizer"),
        (["aten::_softmax"], "memory softmax"),
        (["aten::t"], "host views"),
        (["aten::empty_strided"], "host views"),
    ],
)
def test_names_are_known(names: list[str], kind: str) -> None:
    bound, found = classify(*names)
    assert f"{bound.removesuffix('-bound')} {found}" == kind


def recorded(tmp_path: Path, steps: int = 2) -> tuple[profile, list[Event]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3),
        torch.nn.GroupNorm(4, 32),
        torch.nn.SiLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 14 * 14, 8),
    )
    images = torch.randn(4, 4, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(steps):
            with record_function(STEP):
                model(images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    return prof, json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_real_trace_agrees_with_torchs_own_sums(tmp_path: Path) -> None:
    prof, events = recorded(tmp_path)
    oracle = {row.key: (row.self_cpu_time_total, row.count) for row in prof.key_averages()}
    found = summarise(events)
    assert {"aten::addmm", "aten::mm", "aten::mkldnn_convolution"} <= {cost.name for cost in found.costs}
    for cost in found.costs:
        time, calls = oracle[cost.name]
        assert cost.ms * 1000 * found.steps == pytest.approx(time, rel=1e-3, abs=1)
        assert cost.calls * found.steps == calls
    assert sum(found.bounds.values()) == pytest.approx(1) and all(0 <= share <= 1 for share in found.bounds.values())
    assert sum(found.kinds.values()) == pytest.approx(found.bounds["compute-bound"] + found.bounds["memory-bound"])
    assert not found.compiling


def test_compiling_within_the_window_is_noticed(tmp_path: Path) -> None:
    doubled = torch.compile(lambda x: x * 2, backend="eager")
    with profile(activities=[ProfilerActivity.CPU]) as prof, record_function(STEP):
        doubled(torch.ones(3))
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    assert summarise(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]).compiling


Intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8).map(
    lambda pairs: [(float(start), float(start + length)) for start, length in pairs]
)


def cells(intervals: list[tuple[float, float]]) -> set[int]:
    """The unit cells that intervals between whole numbers cover."""
    return {cell for start, end in intervals for cell in range(int(start), int(end))}


@settings(deadline=None)
@given(Intervals, Intervals)
def test_intervals_are_sets(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    first, second = intervals.union(one), intervals.union(other)
    assert cells(first) == cells(one)
    for combined, expected in (
        (first, cells(one)),
        (intervals.overlap(first, second), cells(one) & cells(other)),
        (intervals.without(first, second), cells(one) - cells(other)),
    ):
        assert cells(combined) == expected and intervals.length(combined) == len(expected)
        assert combined == sorted(combined)
