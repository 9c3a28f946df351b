"""Packed codes -> levels: the one dequantization of all Triton kernels, and the scales that go with it.

Levels are small integers, exact in fp16, bf16 and fp32; scales multiply fp32 sums, never the 16-bit operands, so
that dequantizing adds no rounding error. The layout is drawn in :mod:`lowbit.kernels.weight`.

BITS 1, 2, 4 or 8; A, B: level = A * code + B; A = 0 means that levels are looked up in ``table``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_packed(codes, chunk, n_first, n, k, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of outputs n_first.. and inputs 64 * chunk..: uint8 [BLOCK_K / 64, BLOCK_N * 8 * BITS].

    Every row is one contiguous run. Outputs past N and chunks past the last one read as 0.
    """
    row: tl.constexpr = 8 * BITS
    which = chunk + tl.arange(0, BLOCK_K // 64)
    byte = tl.arange(0, BLOCK_N * row)
    mask = (which < tl.cdiv(k, 64))[:, None] & (byte < (n - n_first) * row)[None, :]
    # 64 bits: a vocabulary matrix may exceed 2 GiB.
    start = (which.to(tl.int64) * n + n_first) * row
    return tl.load(codes + start[:, None] + byte[None, :], mask=mask, other=0)


@triton.jit
def unpack(packed, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint8 [BLOCK_K / 64, BLOCK_N * 8 * BITS] -> codes uint8 [BLOCK_N, BLOCK_K], inputs in natural order."""
    chunks: tl.constexpr = BLOCK_K // 64
    planes: tl.constexpr = 8 // BITS
    code = tl.reshape(packed, (chunks, BLOCK_N, 1, 8 * BITS))
    if BITS < 8:
        shift = (tl.arange(0, planes) * BITS).to(tl.uint8)
        code = (code >> shift[None, None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(tl.permute(code, (1, 0, 2, 3)), (BLOCK_N, BLOCK_K))


@triton.jit
def levels_of(code, table, A: tl.constexpr, B: tl.constexpr, dtype: tl.constexpr):
    """uint8 codes -> levels in ``dtype``, exact: code, A * code and level are integers of magnitude at most 255."""
    if A == 0:
        level = tl.load(table + code.to(tl.int32)).to(dtype)
    else:
        level = code.to(dtype)
        if A != 1:
            level = level * tl.full((), A, dtype)
        level = level + tl.full((), B, dtype)
    return level


@triton.jit
def load_levels(
    codes, table, chunk, n_first, n, k,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Levels of one tile: ``dtype`` [BLOCK_N, BLOCK_K]. Past N and K they are those of code 0, not 0."""
    packed = load_packed(codes, chunk, n_first, n, k, BITS, BLOCK_N, BLOCK_K)
    return levels_of(unpack(packed, BITS, BLOCK_N, BLOCK_K), table, A, B, dtype)


@triton.jit
def load_scales(scales, g, columns, n):
    """Scales of outputs ``columns`` [BLOCK_N] in group ``g``: fp32 [BLOCK_N], 0 past N."""
    return tl.load(scales + g * n + columns, mask=columns < n, other=0.0).to(tl.float32)
