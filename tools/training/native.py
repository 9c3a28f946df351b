"""Training's row kernels of the extension, for tensors on a CPU; PyTorch's operations do the same elsewhere.

What crosses into the extension is checked here: shapes, types, contiguity, the range of targets.
"""

from __future__ import annotations

import torch

from lowbit.errors import LowbitError
from lowbit.ops import _C
from lowbit.quantize import round_scale
from lowbit.tables import Table


def suits(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels take these tensors: contiguous, on a CPU, all fp32 or all bf16; None is always right."""
    return _same_float(*tensors) and all(t is None or t.is_contiguous() for t in tensors)


def _same_float(*tensors: torch.Tensor | None) -> bool:
    present = [t for t in tensors if t is not None]
    same = {t.dtype for t in present} in ({torch.float32}, {torch.bfloat16})
    return same and all(t.device.type == "cpu" for t in present)


def suits_rows(logits: torch.Tensor, teacher: torch.Tensor | None) -> bool:
    """Whether :func:`softmax_gradient` takes these logits: rows may be further apart than they are long."""
    if teacher is not None and (teacher.shape, teacher.stride()) != (logits.shape, logits.stride()):
        return False
    return logits.stride(1) == 1 and _same_float(logits, teacher)


def softmax_gradient(
    logits: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor | None, distill: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and summed NLL, fp32, of logits [M, V]; with ``gradient`` the loss's gradient replaces the logits.

    Args:
        logits: bf16 or fp32. The arithmetic is fp32.
        target: int64 [M].
        teacher: logits of a teacher [M, V], of the same type: the loss is (1 - distill) NLL + distill KL(teacher ||
            student).
    """
    m, v = logits.shape
    target = target.contiguous()
    if not suits_rows(logits, teacher) or target.shape != (m,):
        raise LowbitError("softmax_gradient: wants logits [M, V] of one type and layout on the CPU, and targets [M]")
    if m and not 0 <= int(target.min()) <= int(target.max()) < v:
        raise LowbitError(f"softmax_gradient: targets must lie in 0 .. {v - 1}")
    loss, nll = torch.zeros(2, m)
    address = 0 if teacher is None else teacher.data_ptr()
    _C.softmax_gradient(
        logits.data_ptr(), address, target.data_ptr(), m, v, logits.stride(0), distill,
        logits.dtype == torch.bfloat16, gradient, loss.data_ptr(), nll.data_ptr(),
    )  # fmt: skip
    return loss.sum(), nll.sum()


class Quantizer:
    """Nearest levels and least-squares scales of matrices [N, K] with one table and ``group`` weights a scale."""

    def __init__(self, table: Table, group: int):
        # int8 is symmetric: its level -128 is never produced.
        bottom = 1.0 if table.name == "int8" else 0.0
        self.group = group
        self.levels = _C.LevelTable([float(v) for v in table.levels], table.affine is not None, bottom)

    def load(self, v: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """out [N, K] <- scale * the level nearest to v / scale; v and out fp32 [N, K], scale fp32 [N, G]."""
        self._check(v, scale, out)
        _C.load_nearest(self.levels, v.data_ptr(), scale.data_ptr(), *v.shape, self.group, out.data_ptr())

    def refine(self, v: torch.Tensor, scale: torch.Tensor, iterations: int) -> torch.Tensor:
        """Scales fp32 [N, G] holding fp16 values, ``iterations`` least-squares alternations after ``scale``."""
        self._check(v, scale, v)
        scale = scale.clone()
        _C.refine_scales(self.levels, v.data_ptr(), scale.data_ptr(), *v.shape, self.group, iterations)
        return round_scale(scale)

    def _check(self, v: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        n, k = v.shape
        right = v.dtype == torch.float32 and suits(v, scale, out) and out.shape == v.shape
        if not right or scale.shape != (n, -(-k // self.group)):
            raise LowbitError("quantizing wants contiguous fp32 matrices on the CPU and one scale a row and group")


# Products on bf16 tiles

_TILE_DEPTH = 32  # values of a row that one tile holds


def has_bf16_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles (Intel AMX) and the instruction set in use is theirs."""
    return _C.has_bf16_tiles()


def suits_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [..., K] and weight fp32 [N, K] may be multiplied by :func:`linear`: K a multiple of 32, on a CPU."""
    return (
        x.device.type == weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.shape[1] % _TILE_DEPTH == 0
        and has_bf16_tiles()
    )


def padded_rows(m: int, n: int) -> torch.Tensor:
    """bf16 [m, n], uninitialised, in rows that end with zeros as :func:`linear_gradients` reads them."""
    stride = -(-n // _TILE_DEPTH) * _TILE_DEPTH
    rows = torch.empty(m, stride, dtype=torch.bfloat16)
    rows[:, n:] = 0
    return rows[:, :n]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out = x W^T + bias, summed in fp32; x bf16 [M, K] contiguous, W and bias fp32, out bf16 [M, N] of any stride."""
    _check_product(x, weight, out, bias)
    _C.linear_forward(
        len(x), *weight.shape, x.data_ptr(), x.shape[1], weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out


def linear_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants_x: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x (bf16, or None), W and bias (fp32) for that of :func:`linear`'s output, ``grad`` bf16 [M, N].

    Rows of ``grad`` are those of :func:`padded_rows`, or their length is a multiple of 32.
    """
    _check_product(x, weight, grad, None)
    if grad.stride(0) % _TILE_DEPTH:
        raise LowbitError("linear_gradients: rows must be a multiple of 32 values apart")
    grad_x = torch.empty_like(x) if wants_x else None
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty(len(weight))
    _C.linear_backward(
        len(x), *weight.shape, grad.data_ptr(), grad.stride(0), x.data_ptr(), x.shape[1], weight.data_ptr(),
        grad_x.data_ptr() if wants_x else 0, x.shape[1], grad_weight.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _check_product(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
    n, k = weight.shape
    shapes = x.shape == (len(x), k) and y.shape == (len(x), n) and (bias is None or bias.shape == (n,))
    types = x.dtype == y.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.float32)
    layouts = x.is_contiguous() and y.stride(1) == 1 and y.device.type == "cpu"
    if not (suits_tiles(x, weight) and shapes and types and layouts and (bias is None or bias.is_contiguous())):
        raise LowbitError(
            "products on tiles want bf16 rows, fp32 weights [N, K], K a multiple of 32, and a CPU with tiles"
        )
