"""`linear` on a GPU: checks, the choice among the kernels (config.ROUTES), launches of the Triton ones.

Kernels run on CUDA tensors. Without the CUDA extension (`lowbit._CUDA`) Triton serves every shape, and :func:`serves`
says so. On CPU tensors the Triton kernels run only under Triton's interpreter (TRITON_INTERPRET=1 in the environment
before Triton is first imported), which is for tests: everything else is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.kernels import cuda, tuned
from lowbit.kernels.config import (
    GEMV_MAX_ROWS,
    REDUCE_BLOCK,
    ROUTE_NAMES,
    ROUTES,
    KernelConfig,
    bucket_of,
    find_config,
    fit_group,
    splits,
)  # fmt: skip
from lowbit.kernels.weight import BLOCK_ROWS, GpuWeight
from lowbit.quantize import describe

_INPUTS = (torch.float16, torch.bfloat16)
_OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


def serves(bits: int, rows: int, device: torch.device) -> str:
    """ "cuda", "wgmma", "triton" or "dense": which kernel multiplies ``rows`` >= 1 rows by a weight of this width."""
    if device.type != "cuda" or cuda.module() is None:
        return "triton"
    if torch.cuda.is_available():
        tuned.apply_once(device)
    route = ROUTES[bits, bucket_of(rows)]
    return "cuda" if route == "wgmma" and not cuda.has_wgmma(device) else route


@torch.no_grad()
def linear(
    x: torch.Tensor,
    weight: GpuWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: KernelConfig | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    route: str | None = None,
) -> torch.Tensor:
    """``residual + activation(x @ W.T + bias)``: x fp16/bf16 [..., K], W [N, K], bias float [N] -> [..., N], summed
    in fp32.

    The result carries no gradient, and is the same in every call with the same arguments on the same GPU model.

    Args:
        out_dtype: fp16, bf16 or fp32 (for logits); None for the dtype of ``x``.
        config: tile sizes of the Triton kernels instead of the table's (measurements, tests).
        residual: of the result's dtype and shape, or None.
        activation: None, "relu" or "gelu" (exact).
        route: "cuda", "wgmma", "triton" or "dense" instead of the table's (measurements, tests).

    Raises:
        LowbitError: shapes, dtypes or devices that do not fit; what shall run is missing; CPU tensors without the
            interpreter.
    """
    x2, rows = _check(x, weight, bias)
    n = weight.shape[0]
    out_dtype = out_dtype or x.dtype
    if out_dtype not in _OUTPUTS:
        raise LowbitError(f"out_dtype must be float16, bfloat16 or float32, not {out_dtype}")
    if activation not in cuda.ACTIVATIONS:
        raise LowbitError(f"activation must be None, relu or gelu, not {activation!r}")
    if residual is not None:
        if residual.shape != (*x.shape[:-1], n) or residual.dtype != out_dtype:
            raise LowbitError(f"residual must be {out_dtype} [{rows}, {n}], not {describe(residual)}")
        if residual.device != x.device:
            raise LowbitError(f"residual is on {residual.device}, x on {x.device}")
    if out_dtype not in (x.dtype, torch.float32):  # kernels write the dtype of x, or fp32
        residual = None if residual is None else residual.float()
        return linear(x, weight, bias, torch.float32, config, residual, activation, route).to(out_dtype)
    route = _route(route, config, weight, rows, x.device)
    y = torch.empty((rows, n), dtype=out_dtype, device=x.device)
    if rows:
        with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
            if route in ("cuda", "wgmma"):
                fp32 = None if bias is None else bias.float()
                before = None if residual is None else residual.reshape(rows, n).contiguous()  # strides of y
                cuda.linear(cuda.whole_rows(x2), weight, fp32, y, before, activation, wgmma=route == "wgmma")
                return y.view(*x.shape[:-1], n)
            if route == "dense":
                cuda.dense(x2, weight, bias, y)
            else:
                _triton(x2, weight, bias, y, config)
    y = y.view(*x.shape[:-1], n)
    if activation:
        y = torch.relu(y) if activation == "relu" else torch.nn.functional.gelu(y)
    return y if residual is None else y + residual


def _route(route: str | None, config: KernelConfig | None, weight: GpuWeight, rows: int, device: torch.device) -> str:
    """The kernel that runs, after checking that it can."""
    if route is None:
        route = "triton" if config else serves(weight.bits, max(rows, 1), device)
    if route not in ROUTE_NAMES:
        raise LowbitError(f"route must be one of {', '.join(ROUTE_NAMES)}, not {route!r}")
    if route == "triton":
        require_device(device)
    elif device.type != "cuda":
        raise LowbitError(f"the CUDA kernels run on CUDA tensors, not on {device}")
    elif cuda.module() is None:
        raise LowbitError("the CUDA extension is not built: LOWBIT_CUDA=on pip install -e . (needs nvcc)")
    elif route == "wgmma" and not cuda.has_wgmma(device):
        raise LowbitError("the route wgmma needs an H100 or H200 and an extension that was built for 90a-real")
    return route


def _triton(
    x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, y: torch.Tensor, config: KernelConfig | None
) -> None:
    (rows, k), bits = x.shape, weight.bits
    config = fit_group(config, weight.group, k) if config else find_config(bits, rows, weight.group, k)
    if config.block_m <= GEMV_MAX_ROWS < rows or config.block_m == 1 < rows:
        raise LowbitError(f"a configuration with block_m = {config.block_m} does not serve {rows} rows")
    if config.block_n % BLOCK_ROWS[bits]:
        raise LowbitError(f"block_n must be a multiple of {BLOCK_ROWS[bits]} at {bits} bits, not {config.block_n}")
    (_gemv if rows <= GEMV_MAX_ROWS and config.block_m <= GEMV_MAX_ROWS else _gemm)(x, weight, bias, y, config)


def _check(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """x as [M, K] with neighbouring inputs adjacent in memory, and M."""
    if not isinstance(weight, GpuWeight):
        raise LowbitError(f"weight must be a GpuWeight, not {describe(weight)}")
    n, k = weight.shape
    if not isinstance(x, torch.Tensor) or x.dtype not in _INPUTS:
        raise LowbitError(f"x must be a float16 or bfloat16 tensor, not {describe(x)}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise LowbitError(f"x {list(x.shape)} does not end in K = {k} of the weight [{n}, {k}]")
    if bias is not None:
        if not isinstance(bias, torch.Tensor) or bias.shape != (n,) or bias.dtype not in _OUTPUTS:
            raise LowbitError(f"bias must be a float tensor [{n}], not {describe(bias)}")
        if bias.device != x.device:
            raise LowbitError(f"bias is on {bias.device}, x on {x.device}")
    if weight.device != x.device:
        raise LowbitError(f"the weight is on {weight.device}, x on {x.device}: move it with weight.to(x.device)")
    x2 = x.reshape(-1, k) if x.numel() else x.new_empty(0, k)
    return (x2 if x2.stride(1) == 1 else x2.contiguous()), x2.shape[0]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: decided when they were first imported."""
    import triton

    from lowbit.kernels.gemm import gemm_kernel

    return not isinstance(gemm_kernel, triton.JITFunction)


@functools.cache
def require_device(device: torch.device) -> None:
    """Raises LowbitError unless the kernels can run on tensors of ``device``."""
    try:
        in_interpreter = interpreted()
    except ImportError as error:
        raise LowbitError(
            f"the Triton kernels need Triton, which cannot be imported ({error}): pip install 'lowbit[gpu]'"
        ) from None
    if device.type not in ("cuda", "cpu"):
        raise LowbitError(f"the Triton kernels run on CUDA tensors, not on {device}")
    if device.type == "cpu" and not in_interpreter:
        raise LowbitError(
            "the Triton kernels need CUDA tensors, these are on the CPU: use lowbit.linear there, or for tests "
            "Triton's interpreter (TRITON_INTERPRET=1 before the start)"
        )


def kernel_constants(
    weight: GpuWeight, config: KernelConfig, has_bias: bool, x_dtype: torch.dtype, interpreted: bool
) -> dict[str, Any]:
    """The compile-time arguments that GEMV and GEMM share."""
    import triton.language as tl

    a, b = weight.affine or (0, 0)
    # The interpreter computes in numpy, which has no bf16: its products would be of the bit patterns.
    operand = tl.float16 if x_dtype == torch.float16 else tl.float32 if interpreted else tl.bfloat16
    return {
        "BITS": weight.bits, "A": a, "B": b, "GROUP": weight.group if weight.group < weight.shape[1] else 0,
        "HAS_BIAS": has_bias, "OPERAND": operand,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip


def _gemv(x: torch.Tensor, w: GpuWeight, bias: torch.Tensor | None, y: torch.Tensor, config: KernelConfig) -> None:
    from lowbit.kernels.gemv import gemv_kernel, reduce_kernel

    (m, k), n = x.shape, w.shape[0]
    processors = cuda.processors(x.device) if x.is_cuda else 1  # 1 for the interpreter
    parts = splits(config, n, k, processors)
    out = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    gemv_kernel[(-(-n // config.block_n), parts)](
        x, w.codes, w.scales, w.table, y if bias is None else bias, out, m, n, k, x.stride(0), n,
        **kernel_constants(w, config, bias is not None and parts == 1, x.dtype, interpreted()), **config.options,
    )  # fmt: skip
    if parts > 1:
        reduce_kernel[(-(-n // REDUCE_BLOCK), m)](
            out, y if bias is None else bias, y, parts, m, n, n, HAS_BIAS=bias is not None, BLOCK_N=REDUCE_BLOCK,
        )  # fmt: skip


def _gemm(x: torch.Tensor, w: GpuWeight, bias: torch.Tensor | None, y: torch.Tensor, config: KernelConfig) -> None:
    from lowbit.kernels.gemm import gemm_kernel

    (m, k), n = x.shape, w.shape[0]
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    gemm_kernel[(tiles,)](
        x, w.codes, w.scales, w.table, y if bias is None else bias, y, m, n, k, x.stride(0), n,
        **kernel_constants(w, config, bias is not None, x.dtype, interpreted()), **config.options,
    )  # fmt: skip
