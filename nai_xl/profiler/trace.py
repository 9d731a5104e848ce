"""What a trace of torch.profiler says about training steps: pure functions of its Chrome trace events.

The format is Kineto's (torch/profiler/_chrome_trace_export.py): `cpu_op` are operators on the host, nested in time on
their thread; `kernel`, `gpu_memcpy` and `gpu_memset` ran on the device and carry the `External id` of the operator that
launched them; times are microseconds on one clock.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nai_xl.engine.meter import PAUSED
from nai_xl.profiler.intervals import Event, Interval, holds, length, overlap, span, union, without

# marks in the trace: a step, waiting for its batches, and what is not the training's (checkpoints, evaluation)
STEP, DATA = "nai_xl: step", "nai_xl: data"
MARKS = (STEP, DATA, PAUSED)

COMPUTE, MEMORY, COMMUNICATION = "compute-bound", "memory-bound", "communication"
IDLE, HOST, WAIT = "idle", "host", "data wait"

# Bound and kind of an operator or kernel by its name: the first pattern found decides. Products do O(n) operations for
# each number they read, so arithmetic limits them; all else does a few, so memory traffic does (Williams et al., 2009,
# the roofline model). What no pattern knows is taken for memory-bound, kind "other".
KINDS = tuple(
    (bound, kind, re.compile(pattern, re.IGNORECASE))
    for bound, kind, pattern in (
        (COMMUNICATION, "communication", r"nccl|c10d::|gloo"),
        (HOST, "views", r"::(view|reshape|as_strided_?|t|transpose|permute|expand|select|slice|narrow|split\w*|chunk|"
                        r"unsqueeze|squeeze|detach_?|alias|unbind|_unsafe_view|_reshape_alias|resolve_\w+|empty\w*|"
                        r"new_empty\w*|resize_|result_type|is_nonzero|item|_local_scalar_dense|lift_fresh)$"),
        (MEMORY, "optimizer", r"adam|adafactor|lion|prodigy|foreach|multi_tensor|lerp|vector_norm"),  # clip and EMA too
        (MEMORY, "norm", r"^(triton_(poi|red|per)|cpp)_.*norm|(group|layer|batch|rms)_?norm|moments|welford"),
        (MEMORY, "elementwise", r"^(triton_(poi|red|per)|cpp)_|^Torch-Compiled Region|^CompiledFunction"),  # fused
        (COMPUTE, "attention", r"attention|flash|fmha|sdpa"),
        (MEMORY, "copies", r"nchwToNhwc|nhwcToNchw|convertTensor"),  # cuDNN changing the layout around a convolution
        (COMPUTE, "conv", r"conv(?!ert)|fprop|dgrad|wgrad|winograd"),
        (COMPUTE, "gemm", r"::_?\w*mm$|gemm|gemv|matmul|::linear|nvjet|cutlass|cublas|splitK|^triton_tem"),
        (MEMORY, "copies", r"copy|memcpy|memset|catArray|::(clone|contiguous|cat|stack|to|zero_|_?pin_memory)$"),
        (MEMORY, "softmax", r"softmax"),
        (MEMORY, "elementwise", r"elementwise|reduce|::(silu|gelu|sigmoid|mul|add|sub|rsub|div|neg|pow|square|sqrt|"
                                r"rsqrt|exp|log|sin|cos|abs|where|clamp|fill|sum|mean|mse_loss|masked_fill|upsample|"
                                r"pad|index|gather|arange|ones|zeros|full|normal|uniform|isfinite|bitwise|logical|"
                                r"eq|ne|lt|le|gt|ge)"),
    )
)  # fmt: skip
SOFTWARE = re.compile(r"^(autograd|torch::autograd|torch::jit|profiler)::")  # names with :: that compute nothing


@dataclass(frozen=True)
class Cost:
    """An operator or kernel, its time and calls a step."""

    name: str
    bound: str
    kind: str
    ms: float
    calls: float


@dataclass(frozen=True)
class Summary:
    """Means over the recorded steps. Shares are of the steps' time and sum to 1."""

    steps: int
    seconds: float  # a step
    bounds: dict[str, float]  # share of each bound, and of waiting for data and for the host
    kinds: dict[tuple[str, str], float]  # share of each (bound, kind)
    costs: list[Cost]  # the costliest first
    operators: float  # a step, called by Python or autograd; one called inside another is part of it
    kernels: float  # a step; 0 on a CPU
    reads: dict[str, float]  # aten::item a step, by the operator around it
    waits: dict[str, float]  # cuda...Synchronize a step, by the operator around it
    compiling: bool  # torch.compile was at work


def classify(*names: str) -> tuple[str, str]:
    """Bound and kind of the first name that is known: a kernel's own, then that of the operator that launched it."""
    known = (found for name in names for found in KINDS if found[2].search(name))
    bound, kind, _ = next(known, (MEMORY, "other", None))
    return bound, kind


def summarise(events: Iterable[Event]) -> Summary:
    """What the steps marked in a trace did, without their pauses. Raises ValueError where no step is marked."""
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = {name: [e for e in timed if e["name"] == name and e["cat"] == "user_annotation"] for name in MARKS}
    count = len(marks[STEP])
    if not count:
        raise ValueError("no step is marked in this trace")
    steps = without(sorted(map(span, marks[STEP])), union(map(span, marks[PAUSED])))
    waiting = sorted(map(span, marks[DATA]))
    total = length(steps)
    threads = {event["tid"] for event in marks[STEP]} | {
        event["tid"] for event in timed if str(event["name"]).startswith("autograd::engine")
    }
    host = _Host()
    for thread in threads:
        host.read([event for event in timed if event["tid"] == thread and holds(steps, event)], waiting)
    kernels = [event for event in timed if _on_device(event) and holds(steps, event)]
    spent, lost = _device(kernels, timed, steps, waiting) if kernels else (host.spent, {WAIT: length(waiting)})
    bounds = {COMPUTE: 0.0, MEMORY: 0.0, COMMUNICATION: 0.0, **lost}
    kinds: dict[tuple[str, str], float] = defaultdict(float)
    costs = []
    for (name, bound, kind), (time, calls) in spent.items():
        if bound == HOST:
            continue
        bounds[bound] += time
        kinds[bound, kind] += time / total
        costs.append(Cost(name, bound, kind, time / 1000 / count, calls / count))
    bounds[IDLE if kernels else HOST] = max(0.0, total - sum(bounds.values()))

    def a_step(counts: Counter[str]) -> dict[str, float]:
        return {name: calls / count for name, calls in counts.most_common()}

    return Summary(
        steps=count,
        seconds=total / 1e6 / count,
        bounds={bound: time / total for bound, time in bounds.items()},
        kinds=dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        costs=sorted(costs, key=lambda cost: -cost.ms),
        operators=host.operators / count,
        kernels=len(kernels) / count,
        reads=a_step(host.reads),
        waits=a_step(host.waits),
        compiling=host.compiling,
    )


Spent = dict[tuple[str, str, str], list[float]]  # name, bound, kind -> microseconds, calls


class _Host:
    """What the host's threads did: the time each operator took by itself, without those called inside it."""

    def __init__(self) -> None:
        self.spent: Spent = defaultdict(lambda: [0.0, 0])
        self.operators = 0
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.compiling = False

    def read(self, events: Sequence[Event], waiting: Sequence[Interval]) -> None:
        """Take in one thread. What the loader does in this thread is part of waiting for it."""
        for call in _nested(events):
            self.compiling |= "(dynamo_timed)" in call.name
            if holds(waiting, call.event):
                continue
            if call.event.get("cat") != "cpu_op":
                if call.name.startswith("cuda") and call.name.endswith("Synchronize"):
                    self.waits[call.outermost or "Python"] += 1
                continue
            if call.name == "aten::_local_scalar_dense":
                self.reads[call.outermost or call.name] += 1
            if _is_operator(call.event):
                self.operators += call.outermost is None
                cost = self.spent[call.name, *classify(call.name)]
                cost[0] += call.own
                cost[1] += call.inside != call.name  # an overload that calls another is one call


@dataclass
class _Call:
    """An event on the host: its name, the time that no operator inside it has, and the operators around it."""

    event: Event
    name: str
    own: float
    inside: str | None  # the innermost
    outermost: str | None


def _is_operator(event: Event) -> bool:
    name = str(event["name"])
    compiled = name.startswith(("Torch-Compiled Region", "CompiledFunction"))
    return event.get("cat") == "cpu_op" and (compiled or ("::" in name and not SOFTWARE.match(name)))


def _nested(events: Iterable[Event]) -> list[_Call]:
    """The events of one thread in the order of their beginnings."""
    calls: list[_Call] = []
    around: list[_Call] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while around and event["ts"] >= span(around[-1].event)[1]:
            around.pop()
        parent = around[-1] if around else None
        inside = outermost = None
        if parent is not None:
            inside = parent.name
            outermost = parent.outermost or (parent.name if _is_operator(parent.event) else None)
        call = _Call(event, str(event["name"]), float(event["dur"]), inside, outermost)
        calls.append(call)
        if event.get("cat") == "cpu_op":  # marks and calls of the driver take no time from the operator around them
            if parent is not None:
                parent.own -= call.own
            around.append(call)
    return calls


def _on_device(event: Event) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _device(
    kernels: Sequence[Event], events: Iterable[Event], steps: Sequence[Interval], waiting: Sequence[Interval]
) -> tuple[Spent, dict[str, float]]:
    """Time and calls of each operator on the device, and how long it stood still while the host waited for data.

    Where kernels of several streams overlap, their time is divided among them in proportion.
    """
    launched_by = {
        event["args"]["External id"]: str(event["name"])
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    busy = overlap(union(map(span, kernels)), steps)
    summed = sum(float(kernel["dur"]) for kernel in kernels)
    scale = length(busy) / summed if summed else 0.0
    spent: Spent = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        own = str(kernel["name"])
        operator = launched_by.get(kernel.get("args", {}).get("External id"), "")
        label = operator if "::" in operator and not SOFTWARE.match(operator) else own
        bound, kind = classify(own, label)
        cost = spent[label, MEMORY if bound == HOST else bound, "other" if bound == HOST else kind]
        cost[0] += kernel["dur"] * scale
        cost[1] += 1
    waited = overlap(waiting, steps)
    return spent, {WAIT: length(waited) - length(overlap(waited, busy))}
