"""Checkpoints: safetensors for tensors, JSON for everything else, written aside and renamed. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nai_xl.distributed.strategy import Strategy
from nai_xl.errors import UserError
from nai_xl.interfaces import Stateful
from nai_xl.record.pace import Pace

STATE = "state.json"


def split_tensors(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under their place in it."""
    if isinstance(value, Tensor):
        while at in tensors:  # keys 1 and "1", or "a/b" and the b of an a
            at += "'"
        tensors[at] = value.detach().cpu().contiguous()
        return {"tensor": at}
    if isinstance(value, dict):
        return {"items": [[key, split_tensors(item, f"{at}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [split_tensors(item, f"{at}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def join_tensors(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split_tensors`; tuples come back as lists."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "items" in tree:
        return {key: join_tensors(item, tensors) for key, item in tree["items"]}
    if "list" in tree:
        return [join_tensors(item, tensors) for item in tree["list"]]
    return tree["value"]


class LocalCheckpoints:
    """`dir`/step_00000100/{state.json, <name>.safetensors}; the last `keep` are kept.

    A folder bears its final name only when it is whole, so that a kill at any moment leaves the ones before it usable.
    Every rank of `strategy` saves and loads.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(self, dir: Path, *, keep: int, strategy: Strategy):
        self.dir, self.keep, self.strategy = Path(dir), keep, strategy
        self.stateful: dict[str, Stateful] = {}

    def bind(self, **stateful: Stateful) -> None:
        """The objects to save and restore, by name."""
        self.stateful = stateful

    def saved(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.dir.glob("step_*") if path.suffix != ".tmp" and (path / STATE).is_file())

    def latest_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        saved = self.saved()
        return int(saved[-1].name.removeprefix("step_")) if saved else 0

    def save(self, step: int) -> Path:
        """Collective: write the state after optimizer step `step`. Raises UserError when the disk cannot take it."""
        states = {name: part.state_dict() for name, part in self.stateful.items()}
        final = self.dir / f"step_{step:08d}"
        self.strategy.wait()
        if self.strategy.first:
            self._write(final, step, states)
        self.strategy.wait()
        return final

    def _write(self, final: Path, step: int, states: Mapping[str, dict[str, Any]]) -> None:
        aside = final.with_suffix(".tmp")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            trees = {name: self._write_part(aside, name, state) for name, state in states.items()}
            (aside / STATE).write_text(json.dumps({"step": step, "parts": trees}))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {final} ({error}). Earlier checkpoints are whole: free space, or set "
                "output_dir=DIR, and run the same command again."
            ) from error
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old)

    def _write_part(self, folder: Path, name: str, state: dict[str, Any]) -> Any:
        tensors: dict[str, Tensor] = {}
        tree = split_tensors(state, name, tensors)
        # shared storage, such as tied weights, must be written out twice: safetensors refuses it
        seen: set[int] = set()
        for key, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[key] = tensor.clone()
            seen.add(tensor.data_ptr())
        save_file(tensors, folder / f"{name}.safetensors")
        return tree

    def load_latest(self) -> int:
        """Restore the newest checkpoint into the bound objects; the step it was made at, 0 if there is none.

        Raises UserError when its files are damaged, naming the folder to remove.
        """
        saved = self.saved()
        if not saved:
            return 0
        try:
            content = json.loads((saved[-1] / STATE).read_text())
            loaded = {name: load_file(saved[-1] / f"{name}.safetensors") for name in self.stateful}
            states = {name: join_tensors(content["parts"][name], loaded[name]) for name in self.stateful}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint {saved[-1]} is damaged ({error}); remove that folder to go on from the one before"
            ) from error
        for name, part in self.stateful.items():
            part.load_state_dict(states[name])
        return int(content["step"])


class ModuleState:
    """A module's parameters and buffers as a Stateful."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return dict(self.module.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)


@dataclass
class PaceState:
    """Images a step and a chunk as a Stateful. wide: images of a micro-batch on all processes."""

    pace: Pace
    wide: int

    def state_dict(self) -> dict[str, Any]:
        return self.pace._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when the run began otherwise."""
        self.pace.refuse_other(Pace(**state), self.wide)
