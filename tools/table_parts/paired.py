"""Is one model worse than another? Paired block bootstrap of token NLL, and one-sided non-inferiority."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lowbit.errors import LowbitError

MARGIN = math.log(1.005)  # nats a token: half a percent of perplexity
BLOCK = 200  # tokens: several sentences, beyond which the difference of two models is nearly independent
_RESAMPLES, _SEED, _LEVEL = 10_000, 1, 0.95


@dataclass(frozen=True)
class Comparison:
    """Mean difference of NLL to a reference, nats a token; positive is worse.

    Attributes:
        low, high: two-sided 95 % interval; upper: one-sided 95 % bound.
        non_inferior: whether ``upper`` lies below ln 1.005.
    """

    delta: float
    low: float
    high: float
    upper: float
    non_inferior: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(ours: np.ndarray, reference: np.ndarray) -> Comparison:
    """Both fp [S, T]: NLL of the same T tokens by the models of S seeds, pair by pair.

    Blocks of text are resampled, the same for both models and all seeds, so the interval is that of the mean model over
    other texts; how much seeds differ is reported beside it.

    Raises:
        LowbitError: arrays of different shapes.
    """
    if ours.shape != reference.shape or ours.ndim != 2:
        raise LowbitError(f"token NLL of {list(ours.shape)} and {list(reference.shape)}: not the same tokens")
    difference = (ours.astype(np.float64) - reference).mean(axis=0)
    means = block_bootstrap(difference)
    low, high, upper = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2, _LEVEL]).tolist()
    return Comparison(float(difference.mean()), low, high, upper, upper < MARGIN)


def perplexity_interval(nll: np.ndarray) -> tuple[float, float, float]:
    """(PPL, low, high) of token NLL [S, T]: exp of the mean over seeds and tokens, 95 % over blocks of text."""
    mean = nll.astype(np.float64).mean(axis=0)
    low, high = np.quantile(block_bootstrap(mean), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return math.exp(mean.mean()), math.exp(low), math.exp(high)


def block_bootstrap(values: np.ndarray) -> np.ndarray:
    """Means of resampled texts, fp64 [resamples]: blocks of ``BLOCK`` consecutive tokens drawn with replacement.

    Non-overlapping blocks (Carlstein 1986); the last one may be shorter, and weighs less.
    """
    starts = np.arange(0, len(values), BLOCK)
    sums = np.add.reduceat(values, starts)
    sizes = np.diff(np.append(starts, len(values)))
    rng = np.random.default_rng(_SEED)
    means = []
    for _ in range(0, _RESAMPLES, 1000):  # bounds memory
        drawn = rng.integers(len(starts), size=(1000, len(starts)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
