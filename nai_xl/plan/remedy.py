"""What to type when a plan does not fit its card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nai_xl import config
from nai_xl.engine.gpus import Gpu
from nai_xl.errors import UserError
from nai_xl.plan.run_plan import SPARE, Machines, make

REMEDIES = {
    "hardware=gpu_80gb": 79,
    "hardware=gpu_48gb": 44,
    "hardware=gpu_24gb": 23,
    "hardware=gpu_16gb": 15,
    "hardware=gpu_12gb": 11,
    "run.batch_size=1 hardware=gpu_24gb": 23,
    "run.batch_size=1 hardware=gpu_12gb": 11,
}
"""What is tried in turn when a plan does not fit, from what costs least time; each from cards of so many GiB on."""


def remedy(overrides: Sequence[str], config_dir: Path | None, gpu: Gpu, machines: Machines) -> str:
    """The first override that makes the plan fit the card."""
    for tried in (override for override, least in REMEDIES.items() if gpu.memory_gib >= least):
        # a preset of the card brings its own memory actions
        keys = ["memory", *(override.split("=")[0] for override in tried.split())]
        kept = [override for override in overrides if override.split("=")[0] not in keys]
        for _, choices, cfg in config.combinations([*kept, *tried.split()], config_dir):
            try:
                plan = make(cfg, choices, machines)
            except UserError:  # such as accumulation in the backward pass: the next may do
                continue
            if plan.spare(gpu) >= SPARE:
                return f"{tried} fits the {gpu.name} with {plan.spare(gpu):.1f} GiB to spare"
    return f"no preset fits the {gpu.name}"
