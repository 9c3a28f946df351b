"""Traces of the loss's Hessian and Fisher information, per matrix, by sampling.

The loss is the mean negative log-likelihood of a token, of a model in evaluation mode, in fp32, with attention as
plain matrix products (fused attention has no double backward).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lowbit.model import TransformerLM
from lowbit.tools.training.data import IGNORED, Batch

Weights = Sequence[torch.nn.Parameter]


def mean_nll(model: TransformerLM, batch: Batch) -> torch.Tensor:
    """Mean NLL (nats a token) of a batch, twice differentiable."""
    device = model.output_weight.device
    logits = model(batch.tokens.to(device))
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.to(device).flatten(), ignore_index=IGNORED)


def hutchinson(loss: torch.Tensor, weights: Weights, generator: torch.Generator) -> torch.Tensor:
    """One Rademacher probe of the trace of every weight's diagonal block of the Hessian (Hutchinson 1990).

    One Hessian-vector product serves all blocks: v_l . (H v)_l has the expectation Tr(H_ll), since the signs of
    different blocks are independent.

    Args:
        generator: on the CPU, so that a probe is the same on every device.

    Returns:
        fp64 [len(weights)].
    """
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    probe = [rademacher(w, generator) for w in weights]
    products = torch.autograd.grad(gradients, weights, grad_outputs=probe)
    return torch.stack([(v.double() * hv.double()).sum() for v, hv in zip(probe, products)]).cpu()


def rademacher(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Signs of the shape, type and device of ``like``."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return signs.mul_(2).sub_(1).to(like.device, like.dtype)


def fisher(model: TransformerLM, weights: Weights, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """One sample of the trace of every weight's block of the Fisher information of a token.

    Labels are drawn from the model itself (observed labels would give the "empirical" Fisher, another matrix: Kunstner
    et al. 2019). Given the inputs, the gradients of different tokens are then independent with mean 0, so the squared
    norm of their sum has the expectation of the sum of their squared norms.

    Returns:
        fp64 [len(weights)], never negative.
    """
    device = model.output_weight.device
    logits = model(batch.tokens.to(device))[batch.targets.to(device) != IGNORED]
    with torch.no_grad():
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(device)
        labels = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniform)[:, 0].clamp_(
            max=logits.shape[1] - 1
        )
    loss = F.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, weights)
    return torch.stack([g.double().square().sum() for g in gradients]).cpu() / len(logits)
