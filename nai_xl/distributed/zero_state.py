"""What DeepSpeed's ZeRO has shared out, in the form in which other engines save it.

Whole tensors come together on the first rank's CPU, one parameter after the other; on loading, every rank reads a whole
tensor and keeps its part.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nai_xl.distributed.rows import mapped, read_part
from nai_xl.distributed.weights import refuse_others, shapes
from nai_xl.interfaces import Ema


@dataclass
class ZeroWeights:
    """The trained weights. zero: a distributed.deepspeed.Zero2 or Zero3."""

    reads_rows: ClassVar[bool] = True

    zero: Any
    parameters: Any

    def state_dict(self) -> dict[str, Any]:
        """Collective: whole on the first rank, {} on others."""
        fp32 = _utils().safe_get_full_fp32_param
        found = ((name, fp32(p)) for name, p in self.parameters.items())
        return {name: value.cpu() for name, value in found if self.zero.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when names or shapes differ: a network must not be continued in part."""
        own = {name: torch.empty(_shape(p), device="meta") for name, p in self.parameters.items()}
        refuse_others(state, own)
        assert shapes(own)
        for name, p in self.parameters.items():
            self.zero.set_weight(p, state[name].whole().to(self.zero.device, torch.float32))


@dataclass
class ZeroOptimizer:
    """The inner optimizer, whose parameters are flat pieces of many, seen by the parameters that it was made of."""

    reads_rows: ClassVar[bool] = True

    zero: Any

    def state_dict(self) -> dict[str, Any]:
        """Collective: whole on the first rank, {} on others. Parameters are numbered in the order of their groups."""
        inner, state, groups, number = self.zero.inner, {}, [], 0
        keys, single = self._kinds()
        for group, params in zip(inner.param_groups, self.zero.groups, strict=True):
            numbers = range(number, number + len(params))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": [*numbers]})
            for number, p in zip(numbers, params, strict=True):
                full = {key: _utils().safe_get_full_optimizer_state(p, key) for key in keys}
                if self.zero.first and (keys or single):
                    state[number] = {**{key: value.cpu() for key, value in full.items()}, **mapped(single, _own)}
            number = numbers.stop
        return {"state": state, "param_groups": groups} if self.zero.first else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state["state"]:
            return
        self.zero.make_state()
        keys, _ = self._kinds()
        params = [p for group in self.zero.groups for p in group]
        for number, values in state["state"].items():
            p = params[number]
            for key in keys:
                self.zero.set_state(p, key, values[key].whole().to(self.zero.device))
        first = next(iter(state["state"].values()))
        for flat in self.zero.inner.state.values():
            for key in flat.keys() - set(keys):
                value = _own(key, read_part(first[key], None))
                flat[key] = value.to(flat[key].device) if isinstance(value, Tensor) else value

    def _kinds(self) -> tuple[list[str], dict[str, Any]]:
        """Keys of state that has one number for every element; and state that is one number for all."""
        for flat, state in self.zero.inner.state.items():
            keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
            return keys, {key: value for key, value in state.items() if key not in keys}
        return [], {}


@dataclass
class Partitioned:
    """An average of which every rank keeps its part, under ZeRO 3. Each parameter is cut as DeepSpeed cuts it."""

    reads_rows: ClassVar[bool] = True

    zero: Any
    ema: Ema

    @property
    def on_host(self) -> bool:
        return self.ema.on_host

    def update(self, step: int) -> None:
        self.ema.update(step)

    def averages(self) -> dict[str, Tensor]:
        return self.ema.averages()

    def swapped_in(self) -> AbstractContextManager[None]:
        return self._swapped_in()

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        self.zero.engine.empty_partition_cache()  # what is still collected would not be the averages
        with self.ema.swapped_in():
            yield
            self.zero.engine.empty_partition_cache()

    def state_dict(self) -> dict[str, Any]:
        """Collective: whole on the first rank, None in place of other ranks' tensors."""

        def whole(name: Any, value: Any) -> Any:
            p = self.zero.parameters.get(name)
            return value if p is None else self.zero.whole(value, p)

        found = mapped(self.ema.state_dict(), whole)
        return found if self.zero.first else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def part(name: Any, value: Any) -> Any:
            p, value = self.zero.parameters.get(name), read_part(value, None)
            return value if p is None else self.zero.part(value, p)

        self.ema.load_state_dict(mapped(state, part))


def _own(key: Any, value: Any) -> Any:
    """A copy: what parameters share would be counted up by each of them."""
    return value.clone() if isinstance(value, Tensor) else value


def _shape(p: Any) -> tuple[int, ...]:
    """Of the whole parameter, which ZeRO 3 leaves without elements."""
    return tuple(getattr(p, "ds_shape", p.shape))


def _utils() -> Any:
    return importlib.import_module("deepspeed.utils")
