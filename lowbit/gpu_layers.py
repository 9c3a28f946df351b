"""Modules on the GPU kernels, in the places of :mod:`lowbit.layers`: fp16 activations, fp32 sums."""

from __future__ import annotations

import torch

from lowbit.errors import LowbitError
from lowbit.kernels import GpuWeight, cuda, linear

DTYPE = torch.float16  # of activations between matrices


class GpuLinear(torch.nn.Module):
    """``x float [..., K] -> [..., N]`` with a weight [N, K] of 1, 2, 4 or 8 bits; x is rounded to fp16.

    ``out_dtype``: fp16, or fp32 for logits, whose differences count.

    The weight is no parameter and no buffer, as in :class:`~lowbit.layers.QuantLinear`.
    """

    def __init__(self, weight: GpuWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype = DTYPE):
        super().__init__()
        if bias is not None and bias.shape != weight.shape[:1]:
            raise LowbitError(f"bias {list(bias.shape)} does not fit the weight {list(weight.shape)}")
        self.weight, self.out_dtype = weight, out_dtype
        self.register_buffer("bias", None if bias is None else bias.detach().float().to(weight.device).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.to(DTYPE), self.weight, self.bias, self.out_dtype)

    def extra_repr(self) -> str:
        return f"{self.weight!r}, bias={self.bias is not None}"


def rows_of(weight: GpuWeight, ids: torch.Tensor) -> torch.Tensor:
    """Dequantized rows: ids int64 [...], inside W -> fp32 [..., K]."""
    if ids.is_cuda and cuda.module() is not None:
        return cuda.rows(weight, ids.reshape(-1)).view(*ids.shape, weight.shape[1])
    return weight.dequantize_rows(ids)


class GpuEmbedding(torch.nn.Module):
    """``ids int64 [...] -> fp32 [..., D]``, dequantized rows; :meth:`project` makes it a tied output layer."""

    def __init__(self, weight: GpuWeight):
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return rows_of(self.weight, ids)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden float [..., D] -> fp32 logits [..., V]``."""
        return linear(hidden.to(DTYPE), self.weight, out_dtype=torch.float32)

    def extra_repr(self) -> str:
        return repr(self.weight)
