"""Output layer, softmax, cross-entropy and their gradients in one pass over blocks of rows.

The logits of a batch (2,048 x 10,000) are the largest tensor of a training step; the plain chain of operations writes
and reads them about nine times. Here a row (in PyTorch's operations, for other devices: a block of 64 rows) is turned
from logits into gradients while it sits in cache.
"""

from __future__ import annotations

import torch

from lowbit.tools.training import native

_MATMUL_ROWS = 2048
_CACHE_BYTES = 1 << 21


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, teacher_hidden, teacher_weight, distill, dtype, gradients):
        h = hidden.to(dtype).contiguous()
        if dtype == torch.bfloat16 and native.suits_tiles(h, weight):
            products = _TileProducts(weight)
        else:
            products = _Products(weight.to(dtype))
        grad_h = torch.empty_like(h)
        grad_w = torch.zeros_like(weight, dtype=torch.float32)
        loss, nll = torch.zeros((), device=h.device), torch.zeros((), device=h.device)
        for i in range(0, len(h), _MATMUL_ROWS):
            rows = slice(i, i + _MATMUL_ROWS)
            logits = products.logits(h[rows], products.weight)  # [rows, V], becomes its own gradient in place
            teacher = None
            if teacher_hidden is not None:
                teacher = products.logits(teacher_hidden[rows].to(dtype), teacher_weight)
            part_loss, part_nll = _loss_of_logits(logits, target[rows], teacher, distill, gradients)
            loss += part_loss
            nll += part_nll
            if gradients:
                grad_h[rows], part = products.gradients(logits, h[rows])
                grad_w += part
        ctx.save_for_backward(grad_h, grad_w)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss.to(grad_h.dtype), grad_w * grad_loss, None, None, None, None, None, None


class _Products:
    """Matrix products of the output layer, in the type of ``weight`` [V, D]."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden @ weight.to(hidden.dtype).T

    def gradients(self, grad: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden [R, D] and of the weight [V, D]."""
        return grad @ self.weight, grad.T @ hidden


class _TileProducts(_Products):
    """The same on bf16 tiles, of an fp32 ``weight``."""

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return native.linear(hidden.contiguous(), weight, None, native.padded_rows(len(hidden), len(weight)))

    def gradients(self, grad: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return native.linear_gradients(grad, hidden, self.weight)[:2]


def _loss_of_logits(logits, target, teacher, distill, gradients):
    """Summed loss and NLL; with ``gradients`` logits [R, V] become the gradient of the summed loss."""
    if native.suits_rows(logits, teacher):
        return native.softmax_gradient(logits, target, teacher, distill, gradients)
    loss, nll = torch.zeros(2, device=logits.device)
    for block in _blocks(logits):
        part = None if teacher is None else teacher[block]
        block_loss, block_nll = _softmax_gradient(logits[block], target[block], part, distill)
        loss += block_loss
        nll += block_nll
    return loss, nll


def _blocks(logits: torch.Tensor):
    step = max(1, _CACHE_BYTES // (4 * logits.shape[1])) if not logits.is_cuda else len(logits)
    return (slice(i, i + step) for i in range(0, len(logits), step))


def _softmax_gradient(logits, target, teacher, distill):
    """Replace logits [R, V] by the gradient of the summed loss; return (summed loss, summed NLL) in fp32."""
    p = logits.float()  # fp32 logits themselves are overwritten
    target = target[:, None]
    picked = p.gather(1, target)
    largest = p.amax(1, keepdim=True)
    p.sub_(largest)
    if teacher is not None:
        log_q = teacher.float().log_softmax(1)
        q = log_q.exp()
        divergence = (q * (log_q - p)).sum()  # KL(teacher || student) but for the student's log-normaliser
    p.exp_()
    total = p.sum(1, keepdim=True)
    log_total = total.log()
    nll = (log_total + largest - picked).sum()
    p.div_(total)
    if teacher is None:
        loss, hard = nll, 1.0
    else:
        # d/dz [(1-l) CE + l KL(teacher || student)] = softmax(z) - (1-l) onehot - l p_teacher
        loss = (1 - distill) * nll + distill * (divergence + log_total.sum())
        p.sub_(q, alpha=distill)
        hard = 1 - distill
    p.scatter_add_(1, target, torch.full_like(picked, -hard))
    logits.copy_(p)
    return loss, nll


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    distill: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and summed NLL (nats) of ``target`` int64 [M] under softmax(hidden [M, D] @ weight [V, D]^T).

    With a teacher the loss is (1 - distill) CE + distill KL(teacher || student). The gradient is made in the forward
    pass; matrix products run in the autocast type, the softmax in fp32. Only the loss is differentiable, once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    teacher = (teacher_hidden, teacher_weight, distill)
    # Inside the function gradients are always off: only out here can validation be told from training.
    return _LinearCrossEntropy.apply(hidden, weight, target, *teacher, dtype, torch.is_grad_enabled())
