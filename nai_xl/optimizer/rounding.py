"""Stochastic rounding from float32 to bfloat16, with random bits that are a function of place and time.

A bfloat16 weight keeps 8 significant bits: rounding to the nearest drops every update under 1/512 of the weight, and
training stands still. Rounding up or down with probabilities proportional to the distances has the right expectation
(Gupta et al., 1502.02551, section 3; for bfloat16 Zamirai et al., 2010.06192).

The bits depend on (seed, step, parameter, element) alone. No generator has a state to save, so a resumed run rounds as
the uninterrupted one would, and arms of an ablation are rounded alike. `kernels` does the same sums on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nai_xl.rng import hashed

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: keeps neighbouring steps far apart


def mix(x: Tensor) -> Tensor:
    """A 32-bit word to a well mixed 32-bit word, elementwise, both held in int64.

    `lowbias32` of Chris Wellons, "Prospecting for Hash Functions" (nullprogram.com, 2018), public domain.
    """
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(WORD)
    x = x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(WORD)
    return x.bitwise_xor_(x >> 16)


def parameter_words(seed: int, number: int) -> tuple[int, int]:
    """Two 32-bit words that name parameter `number` of a run with this seed."""
    whole = hashed(seed, number, "rounding")
    return whole & WORD, whole >> 32


def step_keys(words: Tensor, steps: Tensor) -> Tensor:
    """[n,2] int64 keys from the words [n,2] of n parameters and their step numbers [n]; nothing leaves the device."""
    place = (steps.long() * GOLDEN & WORD)[:, None]
    return mix(mix(words) ^ place)


def random_words(key: Tensor, count: int, first: int = 0) -> Tensor:
    """[count] int64 holding 32 random bits for each element from number `first` on, from one parameter's key [2]."""
    element = torch.arange(first, first + count, device=key.device)
    return mix(mix(element ^ key[0]).add_(key[1]).bitwise_and_(WORD))


def further_words(words: Tensor) -> Tensor:
    """32 more bits for each element."""
    return mix((words + GOLDEN) & WORD)


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 `x` to one of the two bfloat16 next to it, with expectation x, by 16 random `bits` (any integer dtype).

    Adding 16 random bits below the kept ones carries with a probability of exactly (distance to the lower) / spacing.
    Numbers that bfloat16 holds stay; infinities and NaN too.
    """
    whole = x.view(torch.int32) + bits.to(torch.int32)
    rounded = (whole & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def rounds_stochastically(make: Callable[..., Any]) -> bool:
    """Whether an optimizer class, or a partial of one, may train bfloat16 weights.

    StochasticOptimizer says so by its member `stochastic_rounding`, which torch's and other libraries' optimizers lack:
    they round to nearest. torchao's are asked by their argument `bf16_stochastic_round`.
    """
    kind, arguments = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    if "bf16_stochastic_round" in arguments:
        return bool(arguments["bf16_stochastic_round"])
    return bool(getattr(kind, "stochastic_rounding", False))
