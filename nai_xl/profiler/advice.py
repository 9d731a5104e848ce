"""What a profile advises: a sentence for whatever costs too much, with the override that may mend it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nai_xl.memory.action import MemoryAction
from nai_xl.profiler.trace import COMMUNICATION, COMPUTE, HOST, IDLE, MEMORY, WAIT, Summary


@dataclass(frozen=True)
class Setup:
    """What the run has chosen, so that no advice names what is there already."""

    batch_size: int
    grad_accum: int
    workers: int
    mixed_precision: str
    memory: Mapping[str, MemoryAction]  # by their options' names

    @property
    def compiles(self) -> bool:
        return any(action.compiles for action in self.memory.values())

    @property
    def decides_attention(self) -> bool:
        """Whether the run says how attention is computed."""
        return any(action.attention for action in self.memory.values())

    @property
    def half_weights(self) -> bool:
        return any(action.weights_in for action in self.memory.values())

    def memory_with(self, *actions: str) -> str:
        """The override that adds these memory actions, "" when all are chosen."""
        new = [action for action in actions if action not in self.memory]
        return f"'memory=[{','.join([*self.memory, *new])}]'" if new else ""


def advice(found: Summary, setup: Setup, *, on_gpu: bool) -> list[str]:
    """A sentence for everything that costs more than it should, naming the override that may mend it."""
    share, kind = found.bounds, _by_kind(found)
    bigger = f"run.batch_size={2 * setup.batch_size}"
    compiled = setup.compiles
    said = []
    if found.compiling:
        said.append("torch.compile was at work in these steps, so they are not typical: profile.wait=50 looks later.")
    if share[WAIT] > 0.05:
        workers = max(4, 2 * setup.workers)
        said.append(f"The step waits {share[WAIT]:.0%} of its time for data: run.workers={workers} loads beside it.")
    if on_gpu and not found.kernels:
        said.append("No kernel was recorded: this machine does not let torch's profiler look at its GPU.")
    if share.get(IDLE, 0) > 0.1:
        fewer = "" if compiled else f", {setup.memory_with('compile')} makes the kernels fewer and larger"
        said.append(
            f"The device stands still {share[IDLE]:.0%} of the time while the host launches {found.kernels:,.0f} "
            f"kernels a step: {bigger} gives each of them more to do{fewer}."
        )
    if share.get(HOST, 0) > 0.2 and not compiled:
        said.append(f"Python and torch's own bookkeeping take {share[HOST]:.0%}: {bigger} divides it by more images.")
    if found.waits.get("aten::is_nonzero", 0) >= 1:
        said.append("The loop waits for the device each step to see a finite gradient: optimizer.fused=true spares it.")
    if share[MEMORY] > 0.4 and not compiled:
        said.append(
            f"{share[MEMORY]:.0%} goes to memory-bound operators: {setup.memory_with('compile')} fuses neighbours "
            "into one."
        )
    if kind["softmax"] > 0.02 and not setup.decides_attention:
        said.append(f"Attention is not fused (softmax {kind['softmax']:.0%}): {setup.memory_with('sdpa')} is.")
    if kind["optimizer"] > 0.15:
        said.append(
            f"The optimizer, the clip and the averages take {kind['optimizer']:.0%}: {bigger} or "
            f"run.grad_accum={2 * setup.grad_accum} updates once for twice the images."
        )
    if on_gpu:
        said += _advice_on_gpu(found, setup, kind)
    return said or [
        f"Nothing stands out: {share[COMPUTE]:.0%} is matrix products, convolutions and attention, as it should be."
    ]


def _advice_on_gpu(found: Summary, setup: Setup, kind: Mapping[str, float]) -> Iterator[str]:
    exact = setup.mixed_precision == "no" and not setup.half_weights
    if exact and found.bounds[COMPUTE] > 0.4:
        yield (f"{found.bounds[COMPUTE]:.0%} goes to products in float32: precision=bf16 does them on tensor cores.")
    if kind["copies"] > 0.1 and not exact and not setup.half_weights:
        without = setup.memory_with("bf16_weights")
        yield (
            f"Copies take {kind['copies']:.0%}, autocast's casts among them: {without} optimizer=adamw_bf16 "
            "precision=fp32 needs none."
        )
    if kind["copies"] > 0.1 and "channels_last" not in setup.memory:
        yield f"Copies take {kind['copies']:.0%}, changes of layout among them: {setup.memory_with('channels_last')}."
    if found.bounds[COMMUNICATION] > 0.15:
        yield (
            f"Processes exchange gradients for {found.bounds[COMMUNICATION]:.0%} of the time: "
            f"run.grad_accum={2 * setup.grad_accum} does it half as often."
        )


def _by_kind(found: Summary) -> Mapping[str, float]:
    kinds: dict[str, float] = defaultdict(float)
    for (_, kind), share in found.kinds.items():
        kinds[kind] += share
    return kinds
