"""Layers that train on bf16 tiles where the CPU has them (Intel AMX), in place of PyTorch's under autocast.

The same numbers but for rounding: operands are rounded to bf16, sums are fp32. Gradients of weights stay fp32, where
autocast rounds them to bf16 on the way. Without tiles, outside of bf16 autocast, on other devices and for other shapes
a layer is what it was; so are the names and values of its parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from lowbit.tools.training import native


def use_tiles(model: nn.Module) -> nn.Module:
    """Turn the layers of ``model`` into those of this module, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = TileLinear
    return model


def under_bf16_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class TileLinear(nn.Linear):
    """``nn.Linear`` on :func:`lowbit.tools.training.native.linear` under bf16 autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.out_features % 32 == 0  # the gradient's rows are read in runs of 32
        if not (whole and under_bf16_autocast() and native.suits_tiles(x, self.weight)):
            return super().forward(x)
        return _Linear.apply(x.to(torch.bfloat16), self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, weight)
        y = native.linear(rows, weight, bias, torch.empty(len(rows), len(weight), dtype=torch.bfloat16))
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_rows = grad.reshape(rows.shape[0], -1).contiguous()
        grad_x, grad_weight, grad_bias = native.linear_gradients(grad_rows, rows, weight, ctx.needs_input_grad[0])
        grad_x = None if grad_x is None else grad_x.view(*grad.shape[:-1], rows.shape[1])
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None
