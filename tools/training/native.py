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
    present = [t for t in tensors if t is not None]
    same = {t.dtype for t in present} in ({torch.float32}, {torch.bfloat16})
    return same and all(t.device.type == "cpu" and t.is_contiguous() for t in present)


def softmax_gradient(
    logits: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor | None, distill: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and summed NLL, fp32, of logits [M, V]; with ``gradient`` the loss's gradient replaces the logits.

    Args:
        logits: bf16 or fp32. The arithmetic is fp32.
        target: int64 [M].
        teacher: logits of a teacher [M, V], of the same type: loss = (1 - distill) NLL + distill KL(teacher
            || student).
    """
    m, v = logits.shape
    target = target.contiguous()
    if not suits(logits, teacher) or target.shape != (m,) or (teacher is not None and teacher.shape != logits.shape):
        raise LowbitError("softmax_gradient: wants contiguous logits [M, V] of one type on the CPU and targets [M]")
    if m and not 0 <= int(target.min()) <= int(target.max()) < v:
        raise LowbitError(f"softmax_gradient: targets must lie in 0 .. {v - 1}")
    loss, nll = torch.zeros(2, m)
    address = 0 if teacher is None else teacher.data_ptr()
    _C.softmax_gradient(
        logits.data_ptr(), address, target.data_ptr(), m, v, distill, logits.dtype == torch.bfloat16, gradient,
        loss.data_ptr(), nll.data_ptr(),
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
