"""`nn.Module`s on packed weights: what a loaded model is made of."""

from __future__ import annotations

import torch

from lowbit.errors import LowbitError
from lowbit.ops import COMPUTE, PackedWeight, linear


class QuantLinear(torch.nn.Module):
    """``x float [..., K] -> fp32 [..., N]`` with a packed weight [N, K].

    The weight is no parameter and no buffer: packed files hold the canonical layout, never this one, and a matrix
    may be shared with a :class:`QuantEmbedding`.

    Args:
        packed: the weight.
        bias: fp32 [N] or None.
        compute: "int8" or "exact", see :mod:`lowbit.ops`.
    """

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None, compute: str = "int8"):
        super().__init__()
        if bias is not None and bias.shape != packed.shape[:1]:
            raise LowbitError(f"bias {list(bias.shape)} does not fit the weight {list(packed.shape)}")
        self.packed, self.compute = packed, _check_compute(compute)
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed, self.bias, self.compute)

    def extra_repr(self) -> str:
        kernel = self.packed.kernel_name(1, self.compute)
        return f"{_describe(self.packed)}, bias={self.bias is not None}, kernel={kernel!r}"


class QuantEmbedding(torch.nn.Module):
    """``ids int64 [...] -> fp32 [..., D]``: rows of a packed matrix [V, D], dequantized as they are read.

    :meth:`project` makes it a tied output layer too: one packed copy serves both.
    """

    def __init__(self, packed: PackedWeight, compute: str = "int8"):
        super().__init__()
        self.packed, self.compute = packed, _check_compute(compute)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed.dequantize_rows(ids)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden float [..., D] -> fp32 logits [..., V]``."""
        return linear(hidden, self.packed, None, self.compute)

    def extra_repr(self) -> str:
        return _describe(self.packed)


def _check_compute(compute: str) -> str:
    if compute not in COMPUTE:
        raise LowbitError(f"compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
    return compute


def _describe(packed: PackedWeight) -> str:
    n, k = packed.shape
    table = ",".join(map(str, packed.table.tolist())) if packed.bits < 8 else "code-128"
    return f"in={k}, out={n}, bits={packed.bits}, table=[{table}], group={packed.group}"
