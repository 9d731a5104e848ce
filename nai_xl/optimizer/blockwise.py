"""Block-wise 8-bit numbers with a dynamic exponent; Dettmers et al., 2110.02861, sections 2.1 and 2.2."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nai_xl.optimizer.part import Part

BLOCK = 256  # elements that share one float32 scale, as in torchao's and bitsandbytes' present releases
SMALLEST = 4096  # smaller tensors are not worth it, and are the sensitive ones: biases and norms


def fits(x: Tensor, part: Part | None = None) -> bool:
    """Whether a tensor is kept in 8 bits; the rest stays in its own type.

    `part`: x is this part of a tensor. Its blocks are then those of the whole tensor, so that a run is the same on any
    number of processes. Where a cut would go through a block, no process keeps 8 bits.
    """
    size = x.numel() if part is None else part.shape[0] * part.width
    return size >= SMALLEST and size % BLOCK == 0 and (part is None or part.cut_between(BLOCK))


@functools.cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """[256] float32, ascending: the numbers that the codes 0..255 stand for, from 0 or -1 to 1.

    For each of seven decimal exponents -6..0 the midpoints of equal parts of [0.1, 1]: 1, 2, 4, ... 64 of them for each
    sign, or twice as many without one; and 0 and 1 (figure 2 of the paper, and its appendix on dynamic tree types).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*middles, *(-x for x in middles)] if signed else middles
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


@functools.cache
def code_bounds(signed: bool, device: torch.device) -> Tensor:
    """[256] float32: what lies above bounds[c] is nearer to code c + 1 than to c; the last is infinite."""
    values = code_values(signed, torch.device("cpu")).double()
    middles = ((values[1:] + values[:-1]) / 2).float()
    return torch.cat([middles, torch.tensor([torch.inf])]).to(device)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [n] as uint8 codes [n], each the nearest, and float32 scales [n / BLOCK], each block's largest size."""
    blocks = x.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, code_bounds(signed, x.device)[:-1])
    return codes.view(-1).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 [n] that codes [n] and scales [n / BLOCK] stand for."""
    values = code_values(signed, codes.device)[codes.int()]
    return (values.view(-1, BLOCK) * scales[:, None]).view(-1)


def decode_from(first: int, codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 [n] for codes [n] that begin with element `first` of a tensor, inside the block of scales[0]."""
    block = (torch.arange(len(codes), device=codes.device) + first % BLOCK) // BLOCK
    return code_values(signed, codes.device)[codes.int()] * scales[block]
