"""From samples to costs: what quantizing each matrix to each precision costs, by one of three metrics (DESIGN 7)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.tools import cli
from lowbit.tools.search.budget import Budget
from lowbit.tools.search.choices import images, squared_errors
from lowbit.tools.search.curvature import fisher, hutchinson, mean_nll
from lowbit.tools.search.filesize import FileSize
from lowbit.tools.search.kl import CONTEXT_CHOICE, KlProbe, holding
from lowbit.tools.search.knapsack import solve
from lowbit.tools.search.rounds import standard_error
from lowbit.tools.training.data import Batch, Batches

METRICS = ("hessian", "fisher", "kl")
_RESAMPLES = 50


class Estimator(Protocol):
    """Samples of a metric, and the costs that their mean stands for."""

    def sample(self, i: int) -> np.ndarray: ...

    def costs(self, mean: np.ndarray) -> np.ndarray:
        """Omega fp64 [matrices, choices] of the mean sample."""

    def by_matrix(self, samples: np.ndarray) -> np.ndarray:
        """One number a sample and matrix, [S, matrices], whose standard error the stopping rule looks at."""


class Text:
    """The batches of the search: pieces of the training text, as it stands, in an order of their own."""

    def __init__(self, batches: Batches, tokens: int, seed: int):
        source = batches.source
        self._batches = Batches(source, max(1, batches.budget // source.length), seed=seed)
        self._rows, self._epoch, self._cached = max(1, tokens // source.length), -1, []

    def __getitem__(self, i: int) -> Batch:
        """Batch i; after the last one of the text it is read anew in another order."""
        if self._epoch < 0:
            self._load(0)
        epoch, index = divmod(i, len(self._cached))
        if epoch != self._epoch:
            self._load(epoch)
        batch = self._cached[index % len(self._cached)]
        return Batch(batch.tokens[: self._rows], batch.targets[: self._rows])

    def _load(self, epoch: int) -> None:
        self._epoch, self._cached = epoch, self._batches.epoch(epoch)


class Curvature:
    """Omega_l(b) = 1/2 Tr(H_l) / n_l ||Q_b(W_l) - W_l||^2, with Hutchinson's estimate of the trace, or the Fisher's."""

    def __init__(
        self, model: TransformerLM, weights: Mapping[str, torch.nn.Parameter], choices: Sequence[str], text: Text,
        seed: int, metric: str,
    ):  # fmt: skip
        self.model, self.text, self.seed, self.metric = model, text, seed, metric
        self.weights = list(weights.values())
        errors = squared_errors({m: w.data for m, w in weights.items()}, choices)
        self.squared_errors = np.array([[errors[m][c] for c in choices] for m in weights])
        self._half_mean = 0.5 * self.squared_errors / np.array([[w.numel()] for w in self.weights])

    def sample(self, i: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        if self.metric == "fisher":
            return fisher(self.model, self.weights, self.text[i], generator).numpy()
        return hutchinson(mean_nll(self.model, self.text[i]), self.weights, generator).numpy()

    def costs(self, mean: np.ndarray) -> np.ndarray:
        return mean[:, None] * self._half_mean

    def by_matrix(self, samples: np.ndarray) -> np.ndarray:
        return samples

    def with_metric(self, metric: str) -> Curvature:
        """The same on the same text, with another trace."""
        other = copy.copy(self)
        other.metric = metric
        return other


class Kl:
    """Omega_l(b) = KL(full precision || matrix l at b), averaged over the two contexts of :class:`KlProbe`."""

    def __init__(
        self, model: TransformerLM, weights: Mapping[str, torch.nn.Parameter], choices: Sequence[str], text: Text
    ):
        names = [*choices, *([] if CONTEXT_CHOICE in choices else [CONTEXT_CHOICE])]
        made = {m: images(w.data, names) for m, w in weights.items()}
        self.squared_errors = np.array(
            [[float((made[m][c] - w.data).double().square().sum()) for c in choices] for m, w in weights.items()]
        )
        self.text, self.probe = text, KlProbe(model, weights, made, choices)

    def sample(self, i: int) -> np.ndarray:
        return self.probe.measure(self.text[i])

    def costs(self, mean: np.ndarray) -> np.ndarray:
        return mean.mean(axis=1)

    def by_matrix(self, samples: np.ndarray) -> np.ndarray:
        return samples.mean(axis=2).sum(axis=2)


class StoppingRule:
    """Enough samples: every matrix's standard error is below a share of its mean, or allocations have settled.

    The second: of the choices in allocations from resampled means (bootstrap over samples), the share that agrees with
    the allocation from all samples.

    Args:
        least: samples before which nothing stops.
    """

    def __init__(
        self, estimator: Estimator, size: FileSize, ratio: float, choices: Sequence[str], least: int,
        standard_error: float, agreement: float,
    ):  # fmt: skip
        self.estimator, self.least = estimator, least
        self.standard_error, self.agreement = standard_error, agreement
        self._weights, self._capacity = Budget.of_ratio(size, ratio).problem(choices)
        if self._capacity < sum(map(min, self._weights)):
            raise LowbitError(f"--ratio {ratio}: no plan of precisions {', '.join(choices)} is that small")

    def __call__(self, samples: np.ndarray) -> str | None:
        if len(samples) < self.least:
            return None
        if float(self.relative_error(samples).max()) < self.standard_error:
            return "standard error"
        return "allocations agree" if self.agreeing(samples) >= self.agreement else None

    def relative_error(self, samples: np.ndarray) -> np.ndarray:
        """Standard error over the absolute mean, by matrix."""
        values = self.estimator.by_matrix(samples)
        return standard_error(values) / np.maximum(np.abs(values.mean(axis=0)), 1e-300)

    def agreeing(self, samples: np.ndarray) -> float:
        rng = np.random.default_rng(0)
        chosen = self._allocate(samples.mean(axis=0))
        draws = rng.integers(len(samples), size=(_RESAMPLES, len(samples)))
        return float(np.mean([np.mean(self._allocate(samples[d].mean(axis=0)) == chosen) for d in draws]))

    def _allocate(self, mean: np.ndarray) -> np.ndarray:
        solution = solve(self._weights, self.estimator.costs(mean), self._capacity)
        return np.array(solution.choice)


def measured_increase(
    model: TransformerLM, weights: Mapping[str, torch.nn.Parameter], choice: str, text: Text, batches: int
) -> dict[str, dict[str, float]]:
    """Mean increase of the NLL (nats a token) when one matrix alone is rounded to ``choice``.

    A model trained with dropout and weight decay is no stationary point of the loss without them, so that an increase
    has a part that changes sign with the rounding error, which no measure of curvature can foresee. ``even`` is the
    part that does not: the mean of the increases at W + (Q - W) and at W - (Q - W).

    Returns:
        matrix -> nll, even, and their standard errors; the same batches with and without, so only differences vary.
    """

    @torch.no_grad()
    def losses() -> np.ndarray:
        return np.array([float(mean_nll(model, text[i])) for i in range(batches)])

    before, out = losses(), {}
    for name, weight in cli.track(weights.items(), "check", len(weights), "matrix"):
        error = images(weight.data, [choice])[choice] - weight.data
        increases = []
        for sign in (1, -1):
            with holding(weights, {name: weight.data + sign * error}):
                increases.append(losses() - before)
        even = (increases[0] + increases[1]) / 2
        out[name] = {
            "nll": float(increases[0].mean()), "nll_standard_error": float(standard_error(increases[0])),
            "even": float(even.mean()), "even_standard_error": float(standard_error(even)),
        }  # fmt: skip
    return out


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = [_mean_ranks(np.asarray(x, dtype=float)) for x in (a, b)]
    deviations = [r - r.mean() for r in ranks]
    norm = np.linalg.norm(deviations[0]) * np.linalg.norm(deviations[1])
    return float(deviations[0] @ deviations[1] / norm) if norm else 0.0


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2
