"""What a training step takes on the device, by its parts and phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nai_xl.engine.gpus import GIB
from nai_xl.memory.action import MemoryAction

ALLOWANCE = int(0.75 * GIB)
"""CUDA's context with its loaded kernels (0.4 to 0.6 GiB), and workspaces of cuBLAS and cuDNN."""
SLACK = 0.03
"""What the caching allocator holds and cannot use, as a share of the peak; with expandable segments, as is advised."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device, of one step that has others before it. `peaks`: phase -> the most that is alive in it."""

    parameters: int  # number, not bytes
    weights: int
    gradients: int
    optimizer: int
    ema: int
    cast_copy: int  # autocast's copies of the weights that the backward pass waits for
    activations: int  # all else that the backward pass waits for
    peaks: Mapping[str, int]
    after_backward: int  # alive when the backward pass is done
    flops: int  # of the micro-batch, with what is recomputed
    estimated: bool = False  # activations are not counted but taken from a documented ratio
    text_encoders: int = 0  # where they stay on the device; not in the peaks

    @property
    def phase(self) -> str:
        """The one with the highest peak; the earliest of equals."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        return self.peaks[self.phase] + self.text_encoders

    def keeping(self, share: float) -> Footprint:
        """With this share of the activations; nothing falls below what the backward pass ends with."""
        spared = int(self.activations * (1 - share))
        peaks = {
            name: max(peak - spared, self.after_backward) if name in ("forward", "backward") else peak
            for name, peak in self.peaks.items()
        }
        return replace(self, activations=self.activations - spared, peaks=peaks, estimated=True)

    @property
    def needed(self) -> int:
        """The peak with what lies outside of tensors: compare it with the card's memory."""
        return int(self.peak * (1 + SLACK)) + ALLOWANCE


# --- what torch.compile decides ---------------------------------------------------------------------------------------

KEPT = ((0.0, 0.09), (0.5, 0.58), (1.0, 1.0))
"""(activation budget, share of the eager activations that compiled blocks keep).

At 0.5 torch's partitioner halves what a transformer block of SDXL keeps (70.8 to 35.4 MiB) and leaves a sixth of a
ResNet block's: 3.5 to 3.9 of the UNet's 6.42 GiB; at 0 only the blocks' inputs stay, as with full checkpointing, 0.55.
"""


def kept_share(actions: Sequence[MemoryAction]) -> float | None:
    """The share of the counted activations that is kept under a budget; None where the count itself holds.

    Compiled blocks without a budget keep somewhat less than counted; there is no figure for how much.
    """
    budgets = [action.activation_budget for action in actions if action.activation_budget is not None]
    if not budgets or not any(action.compiles for action in actions):
        return None
    (low, at_low), (high, at_high) = KEPT[:2] if budgets[0] <= KEPT[1][0] else KEPT[1:]
    return at_low + (at_high - at_low) * (budgets[0] - low) / (high - low)
