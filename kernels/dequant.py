"""Packed codes -> levels: the one dequantization of all Triton kernels, and the scales that go with it.

Levels are small integers, exact in fp16, bf16 and fp32; scales multiply fp32 sums, never the 16-bit operands, so
that dequantizing adds no rounding error. The layout is drawn in :mod:`lowbit.kernels.weight`.

BITS 1, 2, 4 or 8; A, B: level = A * code + B; A = 0 means that levels are looked up in ``table``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(codes, chunk, n_first, n, k, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words of outputs n_first.. and inputs 64 * chunk..: int32 [BLOCK_N / R, BLOCK_K / 64, words of both].

    R outputs share words (64, 32, 16, 16 at 1, 2, 4, 8 bits); BLOCK_N and n_first are multiples of it. The words of a
    block and a chunk are one contiguous run. Blocks past N (padded to 64) and chunks past the last one read as 0.
    """
    rows: tl.constexpr = 64 // BITS if BITS < 4 else 16
    words: tl.constexpr = 2 * rows * BITS
    chunks = tl.cdiv(k, 64)
    block = n_first // rows + tl.arange(0, BLOCK_N // rows)
    which = chunk + tl.arange(0, BLOCK_K // 64)
    word = tl.arange(0, words)
    mask = (block < tl.cdiv(n, 64) * (64 // rows))[:, None, None] & (which < chunks)[None, :, None]
    # 64 bits: a vocabulary matrix may exceed 2 GiB.
    start = (block.to(tl.int64)[:, None] * chunks + which[None, :]) * words
    return tl.load(codes + start[:, :, None] + word[None, None, :], mask=mask, other=0)


@triton.jit
def unpack(stored, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_N / R, BLOCK_K / 64, words] -> codes uint8 [BLOCK_N, BLOCK_K], in natural order."""
    rows: tl.constexpr = 64 // BITS if BITS < 4 else 16
    blocks: tl.constexpr = BLOCK_N // rows
    chunks: tl.constexpr = BLOCK_K // 64
    tiles: tl.constexpr = rows // 16
    vectors: tl.constexpr = tiles * BITS // 4
    u = stored.to(tl.uint32, bitcast=True)
    if BITS < 8:
        u = (u >> 2) | (u << 30)
    u = tl.permute(tl.reshape(u, (blocks, chunks, vectors, 32, 4)), (0, 1, 3, 2, 4))
    u = tl.reshape(u, (blocks, chunks, 32, tiles * BITS, 1))
    # Last dimension: place, e.
    at = tl.arange(0, 32 // BITS)
    shift = (at // 2 * BITS + at % 2 * 16).to(tl.uint32)
    code = ((u >> shift[None, None, None, None, :]) & ((1 << BITS) - 1)).to(tl.uint8)
    code = tl.reshape(code, (blocks, chunks, 8, 4, tiles, 4, 2, 2, 2))  # block chunk g t tile s h n8 e
    return tl.reshape(tl.permute(code, (0, 4, 7, 2, 1, 3, 5, 6, 8)), (BLOCK_N, BLOCK_K))


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
    words = load_words(codes, chunk, n_first, n, k, BITS, BLOCK_N, BLOCK_K)
    return levels_of(unpack(words, BITS, BLOCK_N, BLOCK_K), table, A, B, dtype)


@triton.jit
def load_scales(scales, g, columns, n):
    """Scales of outputs ``columns`` [BLOCK_N] in group ``g``: fp32 [BLOCK_N], 0 past N."""
    return tl.load(scales + g * (tl.cdiv(n, 64) * 64) + columns, mask=columns < n, other=0.0).to(tl.float32)
