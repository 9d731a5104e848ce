"""Triton kernels, the same sums as the plain torch of `adamw_bf16`, `adamw8bit` and `rounding`. Imported when used.

Not annotated: Triton's compiler takes an annotation for a type of its own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found"

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """See rounding.mix; x is uint32 and wraps by itself."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D).to(tl.uint32)
    x = ((x ^ (x >> 15)) * 0x846CA68B).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def words_of(keys, row, element):
    """See rounding.random_words."""
    first = tl.load(keys + 2 * row).to(tl.uint32)
    second = tl.load(keys + 2 * row + 1).to(tl.uint32)
    return mix((mix(element.to(tl.uint32) ^ first) + second).to(tl.uint32))


@triton.jit
def rounded(x, bits, KIND: tl.constexpr):
    """See rounding.round_to_bf16; other types as usual."""
    if tl.bfloat16 == KIND:
        whole = (x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536
        x = tl.where(tl.abs(x) < float("inf"), whole.to(tl.float32, bitcast=True), x)
    return x.to(KIND)


@triton.jit
def address(table, row, column: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
            ALIGNED: tl.constexpr):  # fmt: skip
    at = tl.load(table + row * COLUMNS + column).to(tl.pointer_type(KIND))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def moved(w, g, m, v, corrections, row, lr, decay, beta1, rest1,
          beta2, rest2, eps):  # fmt: skip
    """See AdamWBf16.moved."""
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    first, second = tl.load(corrections + 2 * row), tl.load(corrections + 2 * row + 1)
    step = tl.div_rn(tl.div_rn(m, first), tl.div_rn(tl.sqrt_rn(v), second) + eps)
    return w * decay - lr * step, m, v


@triton.jit
def adamw(table, chunks, corrections, keys, scale, found, lr, decay, beta1, rest1, beta2, rest2, eps,
          WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
          GUARDED: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """table [n,6] int64: addresses of weight, gradient, both moments, size, and the place of the first element in the
    tensor that this is a part of; chunks [programs,2].
    """
    BLOCK: tl.constexpr = 1024
    row = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1) * CHUNK
    p = address(table, row, 0, 6, WEIGHT, ALIGNED)
    gradient = address(table, row, 1, 6, GRADIENT, ALIGNED)
    exp_avg = address(table, row, 2, 6, WEIGHT, ALIGNED)
    exp_avg_sq = address(table, row, 3, 6, WEIGHT, ALIGNED)
    size = tl.load(table + row * 6 + 4)
    first = tl.load(table + row * 6 + 5)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # so that no group of 16 is cut by the mask: wide loads and stores
    writable = size
    if GUARDED:
        writable = tl.where(tl.load(found) == 0, size, 0)
        if ALIGNED:
            writable = tl.multiple_of(writable, 16)
    for offset in range(0, CHUNK, BLOCK):
        at = begin + offset + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        if SCALED:
            g = tl.div_rn(g, tl.load(scale).to(tl.float32))
        w = tl.load(p + at, mask=inside, other=0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=inside, other=0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0).to(tl.float32)
        w, m, v = moved(w, g, m, v, corrections, row, lr, decay, beta1, rest1, beta2, rest2, eps)
        words = words_of(keys, row, first + at)
        more = mix((words + 0x9E3779B9).to(tl.uint32))
        inside = at < writable
        tl.store(p + at, rounded(w, words & 0xFFFF, WEIGHT), mask=inside)
        tl.store(exp_avg + at, rounded(m, words >> 16, WEIGHT), mask=inside)
        tl.store(exp_avg_sq + at, rounded(v, more & 0xFFFF, WEIGHT), mask=inside)


@triton.jit
def decoded(codes, scales, at, rows, inside, inside_rows, values):
    """See blockwise.decode."""
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + rows, mask=inside_rows, other=0.0)
    return tl.load(values + code) * scale[:, None]


@triton.jit
def store_encoded(codes, scales, at, rows, inside, inside_rows, bounds, x):
    """See blockwise.encode; the number of bounds under x is found by halving."""
    scale = tl.max(tl.abs(x), axis=1)
    share = tl.div_rn(x, tl.maximum(scale, 1.1754943508222875e-38)[:, None])
    code = tl.zeros_like(at).to(tl.int32)
    for power in tl.static_range(8):
        middle = tl.load(bounds + code + ((128 >> power) - 1))
        code = tl.where(middle < share, code + (128 >> power), code)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    tl.store(scales + rows, scale, mask=inside_rows)


@triton.jit
def adamw8bit(table, chunks, corrections, keys, scale, found, values1, bounds1, values2, bounds2, lr, decay, beta1,
               rest1, beta2, rest2, eps, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, CHUNK: tl.constexpr,
               SCALED: tl.constexpr, GUARDED: tl.constexpr,
               ALIGNED: tl.constexpr):  # fmt: skip
    """table [n,8] int64: addresses of weight, gradient, codes and scales of both moments, size, and first element."""
    ROWS: tl.constexpr = 4
    QUANT: tl.constexpr = 256  # blockwise.BLOCK
    row = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1) * CHUNK
    p = address(table, row, 0, 8, WEIGHT, ALIGNED)
    gradient = address(table, row, 1, 8, GRADIENT, ALIGNED)
    codes1 = address(table, row, 2, 8, tl.uint8, ALIGNED)
    scales1 = address(table, row, 3, 8, tl.float32, ALIGNED)
    codes2 = address(table, row, 4, 8, tl.uint8, ALIGNED)
    scales2 = address(table, row, 5, 8, tl.float32, ALIGNED)
    size = tl.multiple_of(tl.load(table + row * 8 + 6), 16)
    first = tl.load(table + row * 8 + 7)
    writable = size
    if GUARDED:
        writable = tl.where(tl.load(found) == 0, size, 0)
        if ALIGNED:
            writable = tl.multiple_of(writable, 16)
    for offset in range(0, CHUNK, ROWS * QUANT):
        rows = (begin + offset) // QUANT + tl.arange(0, ROWS)
        at = rows[:, None] * QUANT + tl.arange(0, QUANT)[None, :]
        inside, inside_rows = at < size, rows * QUANT < size
        g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        if SCALED:
            g = tl.div_rn(g, tl.load(scale).to(tl.float32))
        w = tl.load(p + at, mask=inside, other=0).to(tl.float32)
        m = decoded(codes1, scales1, at, rows, inside, inside_rows, values1)
        v = decoded(codes2, scales2, at, rows, inside, inside_rows, values2)
        w, m, v = moved(w, g, m, v, corrections, row, lr, decay, beta1, rest1, beta2, rest2, eps)
        inside, inside_rows = at < writable, rows * QUANT < writable
        tl.store(p + at, rounded(w, words_of(keys, row, first + at) & 0xFFFF, WEIGHT), mask=inside)
        store_encoded(codes1, scales1, at, rows, inside, inside_rows, bounds1, m)
        store_encoded(codes2, scales2, at, rows, inside, inside_rows, bounds2, v)


@triton.jit
def subtract(p, change, key, found, decay, size, BLOCK: tl.constexpr, ROUND: tl.constexpr,
             GUARDED: tl.constexpr):  # fmt: skip
    """p <- decay p - change for one tensor, rounded by its key [2]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    w = tl.load(p + at, mask=inside, other=0).to(tl.float32) * decay - tl.load(change + at, mask=inside, other=0)
    if GUARDED:
        inside = at < tl.where(tl.load(found) == 0, size, 0)
    if ROUND:
        tl.store(p + at, rounded(w, words_of(key, 0, at) & 0xFFFF, tl.bfloat16), mask=inside)
    else:
        tl.store(p + at, w, mask=inside)
