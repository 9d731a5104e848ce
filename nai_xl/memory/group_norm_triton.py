"""GroupNorm and SiLU on NHWC tensors, forward and backward, as Triton kernels. Arithmetic is float32 throughout.

A group's few channels are far apart in NHWC memory, so none walks over groups: tiles of ROWS pixels x COLS channels are
reduced to sums by channel, a small kernel joins them by group, and a second pass over the tiles applies the result.
Moments are joined as counts, means and squared deviations (Chan, Golub and LeVeque 1983), which loses no digits where
the mean is large against the deviation.
"""

# kernels are compiled from untyped source, and triton is not everywhere
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-not-found,import-untyped,misc"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS = 64, 64  # 128 bytes of neighbours in half precision
TILES = 64  # joined at a time


@triton.jit
def _tile(n, pixels, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets and mask of this program's tile in image n of an NHWC tensor, and its channels and whether they exist."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    offset = (n * pixels + row[:, None]) * channels + col[None, :]
    return offset, (row[:, None] < pixels) & (col[None, :] < channels), col, col < channels


@triton.jit
def _moments(x, means, deviations, pixels, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and summed squared deviation of every tile's channels -> [B, tiles, C]."""
    n = tl.program_id(0).to(tl.int64)
    offset, inside, col, exists = _tile(n, pixels, channels, ROWS, COLS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, pixels - tl.program_id(1) * ROWS).to(tl.float32)
    mean = tl.sum(value, axis=0) / count
    apart = tl.where(inside, value - mean[None, :], 0.0)
    at = (n * tl.num_programs(1) + tl.program_id(1)) * channels + col
    tl.store(means + at, mean, mask=exists)
    tl.store(deviations + at, tl.sum(apart * apart, axis=0), mask=exists)


@triton.jit
def _join(means, deviations, mean_out, rstd_out, pixels, channels, tiles, eps,
          WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of one group of WIDTH channels."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, PADDED)
    total = pixels * WIDTH * 1.0
    summed = 0.0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile[:, None] < tiles) & (lane[None, :] < WIDTH)
        count = tl.minimum(ROWS, pixels - tile * ROWS).to(tl.float32)[:, None]
        at = (n * tiles + tile[:, None]) * channels + g * WIDTH + lane[None, :]
        summed += tl.sum(tl.where(inside, count * tl.load(means + at, mask=inside, other=0.0), 0.0))
    mean = summed / total
    squares = 0.0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile[:, None] < tiles) & (lane[None, :] < WIDTH)
        count = tl.minimum(ROWS, pixels - tile * ROWS).to(tl.float32)[:, None]
        at = (n * tiles + tile[:, None]) * channels + g * WIDTH + lane[None, :]
        apart = tl.load(means + at, mask=inside, other=0.0) - mean
        own = tl.load(deviations + at, mask=inside, other=0.0)
        squares += tl.sum(tl.where(inside, own + count * apart * apart, 0.0))
    at_group = n * tl.num_programs(1) + g
    tl.store(mean_out + at_group, mean)
    tl.store(rstd_out + at_group, 1.0 / tl.sqrt(squares / total + eps))


@triton.jit
def _normalised(x, mean, rstd, n, offset, inside, col, exists, groups, WIDTH: tl.constexpr):
    """x of the tile as float32, with mean 0 and variance 1 by group; and 1 / deviation by channel."""
    at = n * groups + col // WIDTH
    scale = tl.load(rstd + at, mask=exists, other=0.0)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    return (value - tl.load(mean + at, mask=exists, other=0.0)[None, :]) * scale[None, :], scale


@triton.jit
def _forward(x, weight, bias, mean, rstd, y, pixels, channels, groups,
             WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    offset, inside, col, exists = _tile(n, pixels, channels, ROWS, COLS)
    unit, _ = _normalised(x, mean, rstd, n, offset, inside, col, exists, groups, WIDTH)
    w = tl.load(weight + col, mask=exists, other=0.0).to(tl.float32)
    z = unit * w[None, :] + tl.load(bias + col, mask=exists, other=0.0).to(tl.float32)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offset, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu(dy, unit, w, bias, offset, inside, col, exists, SILU: tl.constexpr):
    """The gradient of the normalised, weighted value: d silu(z) / dz = s (1 + z (1 - s)) with s = sigmoid(z)."""
    gradient = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = unit * w[None, :] + tl.load(bias + col, mask=exists, other=0.0).to(tl.float32)[None, :]
        s = tl.sigmoid(z)
        gradient = gradient * s * (1.0 + z * (1.0 - s))
    return gradient


@triton.jit
def _backward_sums(x, dy, weight, bias, mean, rstd, plain, along, pixels, channels, groups,
                   WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Sums of the gradient, and of gradient x normalised value, of every tile's channels -> [B, tiles, C] both."""
    n = tl.program_id(0).to(tl.int64)
    offset, inside, col, exists = _tile(n, pixels, channels, ROWS, COLS)
    unit, _ = _normalised(x, mean, rstd, n, offset, inside, col, exists, groups, WIDTH)
    w = tl.load(weight + col, mask=exists, other=0.0).to(tl.float32)
    gradient = _before_silu(dy, unit, w, bias, offset, inside, col, exists, SILU)
    at = (n * tl.num_programs(1) + tl.program_id(1)) * channels + col
    tl.store(plain + at, tl.sum(gradient, axis=0), mask=exists)
    tl.store(along + at, tl.sum(gradient * unit, axis=0), mask=exists)


@triton.jit
def _backward(x, dy, weight, bias, mean, rstd, plain, along, dx, pixels, channels, groups,
              WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """dx = (w dz - its mean over the group - normalised x times the mean of w dz x) / deviation."""
    n = tl.program_id(0).to(tl.int64)
    offset, inside, col, exists = _tile(n, pixels, channels, ROWS, COLS)
    unit, scale = _normalised(x, mean, rstd, n, offset, inside, col, exists, groups, WIDTH)
    w = tl.load(weight + col, mask=exists, other=0.0).to(tl.float32)
    gradient = _before_silu(dy, unit, w, bias, offset, inside, col, exists, SILU) * w[None, :]
    at = n * groups + col // WIDTH
    level = tl.load(plain + at, mask=exists, other=0.0)[None, :]
    slope = tl.load(along + at, mask=exists, other=0.0)[None, :]
    result = (gradient - level - unit * slope) * scale[None, :]
    tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=inside)


class GroupNormSilu(torch.autograd.Function):
    """x [B,C,h,w], weight and bias [C] -> [B,C,h,w] in channels_last order and x's dtype. Keeps x and two numbers by
    group for the backward pass, where GroupNorm and SiLU apart keep two tensors of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        pixels, wide = height * width, channels // groups
        grid = (batch, triton.cdiv(pixels, ROWS), triton.cdiv(channels, COLS))
        means, deviations = x.new_empty((2, batch, grid[1], channels), dtype=torch.float32)
        mean, rstd = x.new_empty((2, batch, groups), dtype=torch.float32)
        y = torch.empty_like(x)
        _moments[grid](x, means, deviations, pixels, channels, ROWS=ROWS, COLS=COLS)
        _join[(batch, groups)](
            means, deviations, mean, rstd, pixels, channels, grid[1], eps,
            WIDTH=wide, ROWS=ROWS, PADDED=triton.next_power_of_2(wide), TILES=TILES,
        )  # fmt: skip
        _forward[grid](
            x, weight, bias, mean, rstd, y, pixels, channels, groups, WIDTH=wide, SILU=silu, ROWS=ROWS, COLS=COLS
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu, ctx.grid = groups, silu, grid
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        pixels, wide = height * width, channels // ctx.groups
        dy = dy.contiguous(memory_format=torch.channels_last)
        plain, along = x.new_empty((2, batch, ctx.grid[1], channels), dtype=torch.float32)
        dx = torch.empty_like(x)
        blocks = {"WIDTH": wide, "SILU": ctx.silu, "ROWS": ROWS, "COLS": COLS}
        tensors = (x, dy, weight, bias, mean, rstd)
        _backward_sums[ctx.grid](*tensors, plain, along, pixels, channels, ctx.groups, **blocks)
        by_channel = torch.stack((plain.sum(1), along.sum(1)))  # [2,B,C]
        by_group = (by_channel * weight.float()).view(2, batch, ctx.groups, wide).sum(-1) / (pixels * wide)
        _backward[ctx.grid](*tensors, *by_group, dx, pixels, channels, ctx.groups, **blocks)
        d_bias, d_weight = by_channel.sum(1)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None
