"""log sum exp of x . W^T along the outputs, without the logits in memory: a vocabulary's normaliser.

Program (i, j) has BLOCK_N outputs and BLOCK_M rows of x; it keeps the largest logit and the sum of exponentials of its
tile, and a second, small step adds the tiles up.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from lowbit.kernels.config import CONFIGS, GEMV_MAX_ROWS, KernelConfig, bucket_of, fit_group
from lowbit.kernels.dequant import load_levels, load_scales
from lowbit.kernels.launch import interpreted, kernel_constants, require_device
from lowbit.kernels.weight import GpuWeight


@triton.jit
def logsumexp_kernel(
    x, codes, scales, table, largest, sums, m, n, k, x_stride,
    BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """largest, sums: fp32 [tiles of N, M]. The rest as of gemm_kernel; HAS_BIAS is False."""
    tile_n, m_first = tl.program_id(0), tl.program_id(1) * BLOCK_M
    n_first = tile_n * BLOCK_N
    rows = m_first + tl.arange(0, BLOCK_M)
    columns = n_first + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[None, :] * x_stride
    logits = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(tl.cdiv(k, BLOCK_K)):
        at = i * BLOCK_K + inputs
        tile = tl.load(x_rows + at[:, None], mask=(at < k)[:, None] & (rows < m)[None, :], other=0.0)
        level = load_levels(codes, table, i * (BLOCK_K // 64), n_first, n, k, BITS, A, B, BLOCK_N, BLOCK_K, OPERAND)
        if GROUP > 0:
            scale = load_scales(scales, i * BLOCK_K // GROUP, columns, n)
            logits += tl.dot(level, tile.to(OPERAND)) * scale[:, None]
        else:
            logits = tl.dot(level, tile.to(OPERAND), logits)
    if GROUP == 0:
        logits *= load_scales(scales, 0, columns, n)[:, None]
    logits = tl.where((columns < n)[:, None], logits, float("-inf"))
    most = tl.max(logits, axis=0)
    at = tile_n * m + rows
    tl.store(largest + at, most, mask=rows < m)
    tl.store(sums + at, tl.sum(tl.exp(logits - most[None, :]), axis=0), mask=rows < m)


def tile_config(bits: int, rows: int, group: int, k: int) -> KernelConfig:
    """The GEMM's tile for these rows; few rows take the smallest tile that uses tensor cores."""
    config = CONFIGS[bits, max(bucket_of(rows), bucket_of(GEMV_MAX_ROWS))]
    return fit_group(config, group, k)


def log_sum_exp(x: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
    """fp32 [M]: log sum_n exp((x W^T)[m, n]) of x fp16/bf16 [M, K], inputs adjacent.

    Raises:
        LowbitError: Triton is missing; CPU tensors without its interpreter.
    """
    require_device(x.device)
    (m, k), n = x.shape, weight.shape[0]
    config = tile_config(weight.bits, max(m, 1), weight.group, k)
    tiles = -(-n // config.block_n)
    largest, sums = (torch.empty((tiles, m), dtype=torch.float32, device=x.device) for _ in range(2))
    if m:
        with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
            logsumexp_kernel[(tiles, -(-m // config.block_m))](
                x, weight.codes, weight.scales, weight.table, largest, sums, m, n, k, x.stride(0),
                **kernel_constants(weight, config, False, x.dtype, interpreted()), **config.options,
            )  # fmt: skip
    return torch.logsumexp(largest + sums.log(), dim=0)
