"""What optimizers with stochastic rounding share: numbering, exact state, clip and refusal inside the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nai_xl.optimizer.part import Part
from nai_xl.optimizer.rounding import parameter_words, round_to_bf16, step_keys


class StochasticOptimizer(Optimizer):
    """bfloat16 parameters are rounded stochastically; parameters of other types, in the same optimizer, as usual.

    Like torch's fused optimizers it honours two optional attributes, 0-dim tensors on the parameters' device:
    `grad_scale`, by which gradients are divided, and `found_inf`: 1 leaves weights and state as they are.
    No step waits for the device. Elements are counted in the order of storage, so weights must be dense.

    per_block: state that has one value for so many elements of the parameter, by its key. parts: which part of a tensor
    a parameter is, where several processes share it. Rounding counts elements in the whole tensor, so that a run is the
    same on any number of processes.
    """

    stochastic_rounding = True
    whole_tensors = False  # whether a step computes with whole tensors, so that none can be shared by processes
    per_block: ClassVar[Mapping[str, int]] = {}
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None  # unset unless the loop sets them, which torch's GradScaler relies on
    found_inf: Tensor | None

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int):
        self.seed = seed
        self.first_number = 0  # of the parameters, where several optimizers share a model
        self.parts: Mapping[Tensor, Part] = {}
        self._words: dict[Any, Tensor] = {}
        super().__init__(params, defaults)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zero state of one parameter, without its step."""
        raise NotImplementedError

    def kind(self, p: Tensor, group: dict[str, Any]) -> Any:
        """What parameters must share, beside their types, to be updated together."""
        return None

    def update(self, group: dict[str, Any], params: list[Tensor], steps: Tensor, keys: Tensor) -> None:
        """Change these parameters, all of one kind and type, and their state.

        steps [n] float32, this one included; keys [n,2] for the rounding.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = chain(*(group["params"] for group in self.param_groups))
        numbers = {p: number for number, p in enumerate(every, self.first_number)}
        for group in self.param_groups:
            for params in self._alike(group):
                for p in params:
                    if not self.state[p]:
                        step = torch.zeros((), dtype=torch.float32, device=p.device)
                        self.state[p] = {"step": step, **self.new_state(p, group)}
                steps = self._advance([self.state[p]["step"] for p in params])
                words = self._words_of(tuple(numbers[p] for p in params), steps.device)
                self.update(group, params, steps, step_keys(words, steps))
        return loss

    def _alike(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The parameters that have gradients, by what must not differ in one kernel."""
        found: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                found.setdefault((p.device, p.dtype, p.grad.dtype, self.kind(p, group)), []).append(p)
        return list(found.values())

    def _advance(self, steps: list[Tensor]) -> Tensor:
        found = getattr(self, "found_inf", None)
        if found is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [(1 - found).to(steps[0])] * len(steps))
        return torch.stack(steps)

    def _words_of(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        if (device, numbers) not in self._words:
            words = [parameter_words(self.seed, number) for number in numbers]
            self._words[device, numbers] = torch.tensor(words, device=device)
        return self._words[device, numbers]

    def first_element(self, p: Tensor) -> int:
        """The place of the parameter's first element in the tensor that it is a part of."""
        return self.parts[p].first if p in self.parts else 0

    # --- one tensor at a time, in plain torch -------------------------------------------------------------------------

    def gradient(self, p: Tensor) -> Tensor:
        """float32 gradient, divided by `grad_scale`, in the order of the parameter's storage, [numel]."""
        assert p.grad is not None
        g = flat(in_layout_of(p, p.grad)).float()
        scale = getattr(self, "grad_scale", None)
        return g if scale is None else g / scale

    def write(self, target: Tensor, value: Tensor, bits: Tensor) -> None:
        """float32 `value` [numel] into `target`, rounded by 16 random bits if that is bfloat16."""
        self.keep(target, round_to_bf16(value, bits) if target.dtype == torch.bfloat16 else value.to(target.dtype))

    def keep(self, target: Tensor, value: Tensor) -> None:
        """`value` [numel] into `target`, unless `found_inf` forbids."""
        found, place = getattr(self, "found_inf", None), flat(target)
        place.copy_(value if found is None else torch.where(found.bool(), place, value))

    # --- saved state --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps its own type: torch's casts it to the parameter's, 8-bit codes included."""
        super().load_state_dict(state_dict)
        saved = chain(*(group["params"] for group in state_dict["param_groups"]))
        own = chain(*(group["params"] for group in self.param_groups))
        for number, p in zip(saved, own, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {
                    key: laid_out(value.to(p.device, copy=True), p)
                    for key, value in state_dict["state"][number].items()
                }


def keep_layout(optimizer: Optimizer) -> None:
    """Make loaded state follow its parameters' memory format, from now on.

    Files hold tensors in plain order. torch's fused optimizers walk parameter and state by address, whatever their
    strides: without this, kernels in NHWC order would be continued with the moments of other elements.
    """

    def lay_out(loaded: Optimizer) -> None:
        for p, state in loaded.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = laid_out(value, p)

    optimizer.register_load_state_dict_post_hook(lay_out)


def flat(x: Tensor) -> Tensor:
    """A dense tensor's storage as a view [numel]."""
    return x.as_strided((x.numel(),), (1,))


def in_layout_of(p: Tensor, x: Tensor) -> Tensor:
    """`x`, stored in the order of `p`, which has its shape."""
    return x if x.stride() == p.stride() else torch.empty_like(p, dtype=x.dtype, device=x.device).copy_(x)


def laid_out(value: Tensor, p: Tensor) -> Tensor:
    """State in its parameter's memory format, if it has its shape."""
    return in_layout_of(p, value) if value.shape == p.shape else value
