"""y = x . W^T for 1 to 16 rows of activations: bound by the bytes of W, so that K is split to fill the GPU.

Program (i, s) computes outputs [i * BLOCK_N, (i + 1) * BLOCK_N) over the s-th part of K. With one split it writes
y; with more, fp32 partial sums go to a workspace [splits, M, N], added in a fixed order by `reduce_kernel`: results
do not depend on timing, which atomics would not give.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.dequant import load_levels, load_scales


@triton.jit
def gemv_kernel(
    x, codes, scales, table, bias, out, m, n, k, x_stride, y_stride,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K] fp16/bf16, M <= BLOCK_M; codes, scales, table: a GpuWeight's; bias [N] or unused.

    out: y [M, N], or with several splits fp32 partial sums [splits, M, N], scaled; HAS_BIAS is then False.
    GROUP: inputs a scale, a multiple of BLOCK_K; 0 for one scale a row. OPERAND: dtype of tensor-core operands.
    """
    n_first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    iterations = tl.cdiv(k, BLOCK_K)
    first = iterations * split // tl.num_programs(1)
    last = iterations * (split + 1) // tl.num_programs(1)
    columns = n_first + tl.arange(0, BLOCK_N)

    if BLOCK_M == 1:
        total = _row_sum(x, codes, scales, table, first, last, n_first, n, k,
                         BITS, A, B, GROUP, BLOCK_N, BLOCK_K)[:, None]  # fmt: skip
    else:
        total = _tile_sum(x, codes, scales, table, first, last, n_first, m, n, k, x_stride,
                          BITS, A, B, GROUP, OPERAND, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if GROUP == 0:
        total *= load_scales(scales, 0, columns, n)[:, None]

    rows = tl.arange(0, BLOCK_M)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    mask = (columns < n)[:, None] & (rows < m)[None, :]
    start = out + split.to(tl.int64) * m * n
    tl.store(start + rows[None, :] * y_stride + columns[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_sum(
    x, codes, scales, table, first, last, n_first, n, k,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of x: fp32 [BLOCK_N]. Sums stay apart along K until the end, so that the loop has no reduction."""
    inputs = tl.arange(0, BLOCK_K)
    columns = n_first + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(first, last):
        at = i * BLOCK_K + inputs
        row = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        level = load_levels(codes, table, i * (BLOCK_K // 64), n_first, n, k, BITS, A, B, BLOCK_N, BLOCK_K, tl.float32)
        if GROUP > 0:
            level *= load_scales(scales, i * BLOCK_K // GROUP, columns, n)[:, None]
        sums += level * row[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _tile_sum(
    x, codes, scales, table, first, last, n_first, m, n, k, x_stride,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to 16 rows of x on tensor cores: fp32 [BLOCK_N, BLOCK_M]."""
    inputs = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_M)
    columns = n_first + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(first, last):
        at = i * BLOCK_K + inputs
        tile = tl.load(
            x + rows[None, :] * x_stride + at[:, None], mask=(at < k)[:, None] & (rows < m)[None, :], other=0.0
        )
        level = load_levels(codes, table, i * (BLOCK_K // 64), n_first, n, k, BITS, A, B, BLOCK_N, BLOCK_K, OPERAND)
        if GROUP > 0:
            sums += tl.dot(level, tile.to(OPERAND)) * load_scales(scales, i * BLOCK_K // GROUP, columns, n)[:, None]
        else:
            sums = tl.dot(level, tile.to(OPERAND), sums)
    return sums


@triton.jit
def reduce_kernel(
    partial, bias, y, splits, m, n, y_stride, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y [M, N] = sum of partial fp32 [splits, M, N], plus the bias. Program (i, row) has BLOCK_N outputs of a row."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * m + row) * n + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + columns, total.to(y.dtype.element_ty), mask=mask)
