"""Settings that accelerate would take from the environment: left out, since the command line says what is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch

PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")  # change no result
MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")  # preferred to torchrun's own numbers by accelerate
OFF = ("", "0", "no", "none", "false", "auto", "n", "f", "off")
# switches: variable -> the key whose option asks for the same, and that option by the variables found
Found = Mapping[str, str]
OVERRIDES: dict[str, tuple[str, Callable[[Found], str]]] = {
    "ACCELERATE_MIXED_PRECISION": ("precision", lambda found: found["ACCELERATE_MIXED_PRECISION"]),
    "ACCELERATE_DOWNCAST_BF16": ("precision", lambda found: "bf16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "run.grad_accum",
        lambda found: found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"],
    ),
    "ACCELERATE_GRADIENT_CLIPPING": ("run.max_grad_norm", lambda found: found["ACCELERATE_GRADIENT_CLIPPING"]),
    "ACCELERATE_USE_FSDP": ("distributed", lambda found: "fsdp2"),
    "ACCELERATE_USE_DEEPSPEED": (
        "distributed",
        lambda found: f"deepspeed_zero{found.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("memory", lambda found: "compile"),
}
# switches of things that this program does not do
NOT_HERE = ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER")
DEVICES = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")
# what accelerate launch sets of itself, and a run without it has too
USUAL = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DOWNCAST_BF16": "no"}


def leave_out(asked: Callable[[str], Sequence[str]], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Remove from the environment all that accelerate would take from it. Returns what to say of that, a line each.

    asked: key -> the options or the value that the command line chooses. A variable that asks for the same is no news.
    """
    found = {name: environ[name] for name in list(environ) if name.startswith(PREFIXES) and name not in KEPT}
    for name in [*found, *(name for name in list(environ) if name.startswith(MPI))]:
        del environ[name]
    switched_on = [name for name, value in found.items() if value.lower() not in OFF and value != USUAL.get(name)]
    return [line for name in switched_on if (line := _told(name, found, asked))]


def _told(name: str, found: Found, asked: Callable[[str], Sequence[str]]) -> str | None:
    """What to say of a switch that is left out; None where that changes nothing."""
    left_out = f"{name}={found[name]} is left out"
    if name in NOT_HERE:
        return f"{left_out}: there is no such engine here; see docs/distributed.md"
    if name in DEVICES:
        return (
            None
            if not torch.cuda.is_available()
            else f"{left_out}; CUDA_VISIBLE_DEVICES says which GPUs are used, and '' is none"
        )
    if name not in OVERRIDES:
        return None
    key, option = OVERRIDES[name]
    wanted, chosen = option(found), asked(key)
    if wanted in chosen:
        return None
    typed = f"'{key}=[{','.join([*chosen, wanted])}]'" if key == "memory" else f"{key}={wanted}"
    return f"{left_out}; set {typed}"
