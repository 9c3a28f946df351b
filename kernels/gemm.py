"""y = x . W^T for more than 16 rows of activations: tensor-core products of dequantized tiles, fp32 accumulation.

The tile computed is W . x^T [BLOCK_N, BLOCK_M]: as the left operand the dequantized levels may stay in registers,
where a right operand of sm_90's warp-group products has to be written back to shared memory first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.dequant import load_levels, load_scales


@triton.jit
def gemm_kernel(
    x, codes, scales, table, bias, y, m, n, k, x_stride, y_stride,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K] fp16/bf16, y [M, N]; codes, scales, table: a GpuWeight's; bias [N] or unused.

    GROUP: inputs a scale, a multiple of BLOCK_K; 0 for one scale a row. OPERAND: dtype of tensor-core operands.
    """
    m_first, n_first = _tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    rows = m_first + tl.arange(0, BLOCK_M)
    columns = n_first + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[None, :] * x_stride  # [1, BLOCK_M]

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(tl.cdiv(k, BLOCK_K)):
        at = i * BLOCK_K + inputs
        tile = tl.load(x_rows + at[:, None], mask=(at < k)[:, None] & (rows < m)[None, :], other=0.0)
        level = load_levels(codes, table, i * (BLOCK_K // 64), n_first, n, k, BITS, A, B, BLOCK_N, BLOCK_K, OPERAND)
        if GROUP > 0:
            sums += tl.dot(level, tile.to(OPERAND)) * load_scales(scales, i * BLOCK_K // GROUP, columns, n)[:, None]
        else:
            sums = tl.dot(level, tile.to(OPERAND), sums)

    if GROUP == 0:
        sums *= load_scales(scales, 0, columns, n)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    start = y + rows.to(tl.int64)[None, :] * y_stride
    mask = (columns < n)[:, None] & (rows < m)[None, :]
    tl.store(start + columns[:, None], sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tile_of(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and output of a program. Bands of 8 row tiles run through all outputs, so that the programs in
    flight share their rows of x and their tiles of W in the L2 cache."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    per_band = 8 * tl.cdiv(n, BLOCK_N)
    band = program // per_band
    height = tl.minimum(tiles_m - band * 8, 8)
    inside = program % per_band
    return (band * 8 + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
