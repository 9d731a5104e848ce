"""What a step costs beside its mathematics: it never waits for the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode

from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.schedule import TableSchedule
from nai_xl.engine import loop
from nai_xl.engine.hooks import Evaluate, Save
from nai_xl.engine.meter import Meter
from nai_xl.train import train
from nai_xl.training import session as program

# what makes the host wait for a GPU: reading a value (item, bool, float, tolist) or a data-dependent shape
WAITING = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2"}


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, while `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operations, self.counting = 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting:
            self.operations += 1
            masks = [x for x in torch.utils._pytree.tree_leaves(args) if getattr(x, "dtype", None) == torch.bool]
            name = func.overloadpacket.__name__
            self.found.update({name} & WAITING or ({"boolean mask"} if name == "index" and masks else ()))
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits() -> None:
    with Waits() as waits:
        x = torch.ones(3)
        bool(x[0]), x.sum().item(), x[x > 0], x.equal(x)
    assert waits.found == {"_local_scalar_dense": 2, "boolean mask": 1, "equal": 1}


@pytest.mark.parametrize(
    "choices",
    [
        [],
        ["run.grad_accum=2", "ema.every=2", "ema.device=cpu"],
        ["schedule=shifted", "loss=uncertainty", "timesteps=inference_grid"],
        [
            "objective.normalize_weights=true",
            "timesteps=logit_normal",
            "error=scheduled_huber",
            "noise.offset=0.1",
            "ema=none",
        ],
        ["memory=[sdpa,gradient_checkpointing,channels_last]", "precision=bf16"],
        ["memory=[sdpa,optimizer_in_backward]", "latents=per_channel", "lr=cosine"],
    ],
    ids=lambda choices: " ".join(choices) or "defaults",
)
def test_no_step_waits_for_the_device(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, choices: list[str]
) -> None:
    waits, read = Waits(), Meter.read

    def apart(function: Any) -> Any:
        """Reports, checkpoints and evaluation are no part of a step. Reading and the making of tables, one for each
        canvas, are on the host alone."""

        def called(*args: Any, **kwargs: Any) -> Any:
            before, waits.counting = waits.counting, False
            try:
                return function(*args, **kwargs)
            finally:
                waits.counting = before

        return called

    def watched(run: Any, parts: Any, **kwargs: Any) -> int:
        parts.batches = iter(apart(parts.batches.__next__), None)
        with waits:
            return loop.train(run, parts, **kwargs)

    monkeypatch.setattr(Meter, "read", apart(read))
    monkeypatch.setattr(Save, "save", apart(Save.save))
    monkeypatch.setattr(TableSchedule, "for_canvas", apart(TableSchedule.for_canvas))
    monkeypatch.setattr(Objective, "expected_weight", apart(Objective.expected_weight))
    monkeypatch.setattr(Evaluate, "__call__", apart(Evaluate.__call__))
    monkeypatch.setattr(program, "train", watched)
    train(small("run.max_images=12", "run.log_every=1000", *choices), {})
    assert waits.operations > 1000
    assert not waits.found
