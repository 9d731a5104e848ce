"""Whether two trainers compute the same: what a peer's own loop was given is given to our UNet and objective.

python benchmarks/peers_parity.py MODEL CAPTURED PRECISION LEARNING_RATE OUT.json, started by peers.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nai_xl.diffusion.loss import uniform as even
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import Epsilon
from nai_xl.diffusion.schedule import scaled_linear
from nai_xl.diffusion.timesteps import uniform
from nai_xl.distributed.none import SingleProcess
from nai_xl.distributed.strategy import StepSettings
from nai_xl.interfaces import Batch
from nai_xl.model.sdxl import load_sdxl

TOLERANCE = {"no": 1e-5, "bf16": 1e-2}  # relative; architecture's fair-measurement rule
Step = dict[str, Tensor]


def compare(model: Path, theirs: Sequence[Step], precision: Any, rate: float) -> list[dict[str, float]]:
    """Relative differences of x_t, loss and gradient norm at each captured step.

    Ours goes on from its own weights, so that from the second step on our update, clip and AdamW, is compared too.
    """
    strategy = SingleProcess().start(precision)
    unet = load_sdxl(model).unet.train()
    unet.enable_gradient_checkpointing()  # changes memory, no value
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=0.01, fused=True)
    wrapped = strategy.wrap(unet, dict(unet.named_parameters()), lambda _: optimizer, StepSettings(max_grad_norm=1.0))
    assert wrapped.update is not None
    objective = Objective(scaled_linear(), Epsilon(), uniform, even)
    rows = []
    for step in theirs:
        batch = as_batch(step).to(strategy.device)
        losses, level = objective(wrapped.module, batch)
        loss = losses.mean()
        strategy.backward(loss)
        noisy = objective.schedule.add_noise(batch.latents, batch.noise, level)
        ours = {"noisy": noisy, "loss": loss.detach(), "grad_norm": wrapped.update()}
        rows.append({name: difference(value, step[name]) for name, value in ours.items()})
    return rows


def as_batch(step: Step) -> Batch:
    """The captured tensors as our batch; u is the middle of the interval that gives their timestep."""
    count = len(step["t"])
    floats = {name: step[name].float() for name in ("latents", "context", "pooled", "time_ids", "noise")}
    numbers = torch.arange(count)
    u = (step["t"].double() + 0.5) / 1000
    return Batch(**floats, weight=torch.ones(count), position=numbers, item=numbers, u=u)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| in float64, by the Euclidean norm."""
    a, b = ours.detach().cpu().double(), theirs.cpu().double()
    return ((a - b).norm() / b.norm()).item()


def passed(rows: Sequence[dict[str, float]], precision: str) -> bool:
    """Whether x_t, loss and gradient norm agree at every step; a value that is not a number does not.

    x_t counts because the loss of random weights hardly depends on it: latents wrong by 0.1 % would not show.
    """
    limit = TOLERANCE[precision]
    return all(value <= limit for row in rows for value in row.values())


if __name__ == "__main__":
    model, captured, precision, rate, out = sys.argv[1:]
    steps = torch.load(captured, weights_only=True)
    Path(out).write_text(json.dumps(compare(Path(model), steps, precision, float(rate))), encoding="utf-8")
