"""All precisions of every matrix in one network, mixed by probabilities that are learned with it (DESIGN section 7).

W_hat = sum_b pi_b Q_b(W), pi = softmax((alpha + Gumbel) / tau) (Jang et al. 2017; arXiv 2112.11540, section 3.2). The
gradient at W_hat passes straight through to W, and reaches alpha through pi. In the second half pi is rounded to the
precision that it favours, again with a straight-through gradient, so that what is trained is a network of one
precision a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.quantize import fit, nearest_codes, round_scale
from lowbit.tables import find_table
from lowbit.tools.search.choices import CHOICES


class Mixture:
    """One matrix of the supernet.

    Attributes:
        weight: the model's parameter [N, K]; holds W_hat.
        latent: W, a parameter of the weights' optimiser.
        images: Q_b(W) [C, N, K] as of the last :meth:`refresh`.
    """

    def __init__(self, weight: torch.nn.Parameter, choices: Sequence[str]):
        self.weight = weight
        self.latent = torch.nn.Parameter(weight.data.clone())
        self.tables = [find_table(CHOICES[c].bits, CHOICES[c].table) for c in choices]
        self.scales = [fit(weight.data, table)[1].float() for table in self.tables]
        self.images = torch.empty(len(choices), *weight.shape, device=weight.device)
        self._render()

    def refresh(self) -> None:
        """Re-solve the scales for the moved latent, one step of alternating least squares, and quantize it anew."""
        v = self.latent.data
        for i, (table, scale) in enumerate(zip(self.tables, self.scales)):
            levels = torch.tensor(table.levels, dtype=torch.float32, device=v.device)
            t = levels[nearest_codes(v / scale, table).int()]
            top, bottom = (t * v).sum(1, keepdim=True), t.square().sum(1, keepdim=True)
            solved = torch.where((bottom > 0) & (top > 0), top / bottom, scale)
            self.scales[i] = round_scale(solved)
        self._render()

    def _render(self) -> None:
        v = self.latent.data
        for image, table, scale in zip(self.images, self.tables, self.scales):
            levels = torch.tensor(table.levels, dtype=torch.float32, device=v.device)
            torch.mul(levels[nearest_codes(v / scale, table).int()], scale, out=image)

    def load(self, pi: torch.Tensor) -> None:
        """weight <- sum_b pi_b Q_b(W); pi fp32 [C]."""
        torch.mv(self.images.view(len(pi), -1).T, pi.to(self.images.device), out=self.weight.data.view(-1))

    def pi_gradient(self) -> torch.Tensor:
        """d loss / d pi_b = <gradient at W_hat, Q_b(W)>, fp32 [C] on the CPU."""
        return torch.mv(self.images.view(len(self.images), -1), self.weight.grad.reshape(-1)).cpu()

    def state(self) -> dict[str, Any]:
        return {"latent": self.latent.data, "scales": self.scales}

    def restore(self, state: dict[str, Any]) -> None:
        self.latent.data.copy_(state["latent"])
        self.scales = [s.to(self.weight.device) for s in state["scales"]]
        self._render()


@dataclass(frozen=True)
class SizeTerm:
    """The augmented Lagrangian of the budget: mu (S/B - 1) + delta/2 [S/B - 1]_+^2.

    Attributes:
        nbytes: expected bytes of every matrix's choices, [M, C]; rest: of everything else; budget: B.
    """

    nbytes: torch.Tensor
    rest: float
    budget: float
    delta: float

    def excess(self, p: torch.Tensor) -> torch.Tensor:
        """S/B - 1 under probabilities p [M, C], without noise."""
        return ((p * self.nbytes).sum() + self.rest) / self.budget - 1

    def loss(self, p: torch.Tensor, mu: float) -> torch.Tensor:
        excess = self.excess(p)
        return mu * excess + self.delta / 2 * excess.clamp(min=0).square()

    def raised(self, mu: float, p: torch.Tensor, rate: float) -> float:
        """The multiplier after one step: it grows while the network is too large, and is never negative."""
        return max(0.0, mu + rate * float(self.excess(p)))


class Sampler:
    """Draws pi for every matrix, and turns gradients at pi into gradients at alpha."""

    def __init__(self, alpha: torch.nn.Parameter, temperatures: tuple[float, float], seed: int):
        first, last = temperatures
        if not 0 < last <= first < math.inf:
            raise LowbitError(f"temperatures must fall and be positive, not {first} to {last}")
        self.alpha, self.temperatures = alpha, temperatures
        self.generator = torch.Generator().manual_seed(seed)

    def temperature(self, progress: float) -> float:
        """Geometric from the first to the last; ``progress`` from 0 to 1."""
        first, last = self.temperatures
        return first * (last / first) ** progress

    def draw(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(pi that the network is built with, pi before rounding), both fp32 [M, C]."""
        self.tau = self.temperature(progress)
        uniform = torch.rand(self.alpha.shape, generator=self.generator).clamp_(1e-9, 1 - 1e-7)
        gumbel = -(-uniform.log()).log()
        soft = ((self.alpha.data + gumbel) / self.tau).softmax(-1)
        if progress < 0.5:
            return soft, soft
        return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[1]).float(), soft

    def alpha_gradient(self, soft: torch.Tensor, pi_gradient: torch.Tensor) -> torch.Tensor:
        """Through the softmax: pi (g - <pi, g>) / tau, all [M, C]."""
        return soft * (pi_gradient - (soft * pi_gradient).sum(-1, keepdim=True)) / self.tau


def log_probabilities(alpha: torch.Tensor, matrices: Sequence[str], choices: Sequence[str]) -> Mapping[str, Any]:
    """matrix -> choice -> log pi."""
    rows = alpha.detach().double().log_softmax(-1).tolist()
    return {m: dict(zip(choices, row)) for m, row in zip(matrices, rows)}
