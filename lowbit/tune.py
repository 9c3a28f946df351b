"""Weights of a log-linear score, tuned on word errors by exact line search (DESIGN section 8).

Along a line through weight space the score of every hypothesis is linear in one number x, so the list's choice changes
only where the upper envelope of those lines breaks (Och, ACL 2003). Merging the breaks of all utterances gives the
corpus's errors as an exact step function of x: there is no grid to be too coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import LowbitError, check_seed


@dataclass(frozen=True)
class Point:
    """A point on a line: the middle of the best plateau, the errors there and the plateau's width."""

    x: float
    errors: int
    width: float


class ErrorSurface:
    """Errors of the hypotheses chosen by ``base + sum_f weight_f * feature_f``; ties go to the earlier hypothesis.

    Args:
        base: per utterance fp64 [H]: the score whose weight is 1.
        features: per utterance fp64 [F, H].
        errors: per utterance int [H], word errors of every hypothesis.
    """

    def __init__(self, base: Sequence[np.ndarray], features: Sequence[np.ndarray], errors: Sequence[np.ndarray]):
        if not len(base) == len(features) == len(errors) or not len(base):
            raise LowbitError("weights cannot be tuned without utterances")
        width = max(map(len, base))
        self.n_features = len(features[0])
        self.base = np.full((len(base), width), -np.inf)
        self.features = np.zeros((self.n_features, len(base), width))
        self.errors = np.zeros((len(base), width), np.int64)
        for u, (b, f, e) in enumerate(zip(base, features, errors)):
            self.base[u, : len(b)], self.features[:, u, : len(b)], self.errors[u, : len(b)] = b, f, e
        self._real = np.isfinite(self.base)
        self._rows = np.arange(len(base))
        self.scale = self._scales()

    def _scales(self) -> np.ndarray:
        """fp64 [F]: weight at which a feature moves a typical list as much as the base score does."""

        def spread(x: np.ndarray) -> float:
            inside = np.where(self._real, x, np.nan)
            return float((np.nanmax(inside, 1) - np.nanmin(inside, 1)).mean())

        spreads = np.array([spread(f) for f in self.features])
        return np.where(spreads > 0, (spread(self.base) or 1.0) / np.where(spreads > 0, spreads, 1), 1.0)

    def choose(self, weights: np.ndarray) -> np.ndarray:
        """int64 [U]: index of the hypothesis with the highest score."""
        return (self.base + np.tensordot(weights, self.features, 1)).argmax(1)

    def count(self, weights: np.ndarray) -> int:
        """Word errors of the corpus."""
        return int(self.errors[self._rows, self.choose(weights)].sum())

    def steps(self, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors of the corpus at ``origin + x * direction`` as a step function of x.

        Returns:
            breaks fp64 [B], ascending, and errors int64 [B + 1] in the intervals before, between and after them.
        """
        a = self.base + np.tensordot(origin, self.features, 1)
        b = np.tensordot(direction, self.features, 1)
        lowest = np.where(self._real, b, np.inf).min(1, keepdims=True)
        now = np.where(self._real & (b == lowest), a, -np.inf).argmax(1)
        start = int(self.errors[self._rows, now].sum())
        at = np.full(len(a), -np.inf)
        breaks, deltas = [], []
        rows = self._rows
        while len(rows):
            rise, fall = b[rows] - b[rows, now[rows]][:, None], a[rows, now[rows]][:, None] - a[rows]
            steeper = self._real[rows] & (rise > 0)
            crossing = np.where(steeper, fall / np.where(steeper, rise, 1), np.inf)
            x = crossing.min(1)
            going = np.isfinite(x)
            # Of several lines that cross at once the steepest is the highest right after.
            chosen = np.where(crossing == x[:, None], b[rows], -np.inf).argmax(1)[going]
            rows, x = rows[going], np.maximum(x[going], at[rows[going]])
            breaks.append(x)
            deltas.append(self.errors[rows, chosen] - self.errors[rows, now[rows]])
            now[rows], at[rows] = chosen, x
        all_breaks, all_deltas = np.concatenate(breaks), np.concatenate(deltas)
        order = np.argsort(all_breaks, kind="stable")
        unique, first = np.unique(all_breaks[order], return_index=True)
        sums = np.add.reduceat(all_deltas[order], first) if len(first) else all_deltas
        kept = sums != 0
        return unique[kept], start + np.concatenate([[0], sums[kept].cumsum()]).astype(np.int64)

    def line_search(self, origin: np.ndarray, direction: np.ndarray, low: float, high: float) -> Point:
        """The middle of the widest of the best plateaus for x in [low, high]."""
        breaks, errors = self.steps(origin, direction)
        edges = np.concatenate([[low], breaks.clip(low, high), [high]])
        widths = np.diff(edges)
        errors = np.where(widths > 0, errors, np.iinfo(np.int64).max)
        best = np.flatnonzero(errors == errors.min())
        i = best[widths[best].argmax()]
        return Point(float(edges[i] + widths[i] / 2), int(errors[i]), float(widths[i]))


def tune(
    surface: ErrorSurface, lower: Sequence[float], restarts: int = 8, directions: int = 4, seed: int = 0
) -> np.ndarray:
    """Weights fp64 [F] with the fewest errors that the search finds, never more than weights of 0 have.

    Powell's method with exact line searches: coordinate and random directions from the first pass (weights 0) and from
    random starts, until no line improves; at last the winner is moved to the middle of its plateau along every weight.

    Args:
        lower: least allowed weight per feature: 0, or -inf for either sign. Weights are held below 100 times the scale
            at which the feature outweighs the base score.
        directions: random directions tried in every round.
    """
    check_seed(seed)
    rng = np.random.default_rng(seed)
    high = 100 * surface.scale
    low = np.maximum(np.asarray(lower, dtype=np.float64), -high)
    n = surface.n_features
    best, best_errors = np.zeros(n), surface.count(np.zeros(n))
    for start in range(restarts + 1):
        at = np.zeros(n) if start == 0 else (rng.standard_normal(n) * surface.scale).clip(low, high)
        errors = surface.count(at)
        improving = True
        while improving:
            random = rng.standard_normal((directions, n)) * surface.scale
            found, found_errors = _sweep(surface, at, errors, [*np.diag(surface.scale), *random], low, high)
            improving, at, errors = found_errors < errors, found, found_errors
        if errors < best_errors:
            best, best_errors = at, errors
    return _centre(surface, best, best_errors, low, high)


def _sweep(surface, at, errors, directions, low, high) -> tuple[np.ndarray, int]:
    """Follow every direction in turn to its best point, where that is better."""
    for direction in directions:
        candidate = _best_on_line(surface, at, direction, low, high)
        if candidate is not None and (count := surface.count(candidate)) < errors:
            at, errors = candidate, count
    return at, errors


def _centre(surface, at, errors, low, high, rounds: int = 3) -> np.ndarray:
    """Move to the middle of the widest plateau along each weight while the errors stay."""
    for _ in range(rounds):
        for direction in np.diag(surface.scale):
            candidate = _best_on_line(surface, at, direction, low, high)
            # Counted again: on a break the order of additions decides, and the line search assumes exact sums.
            if candidate is not None and (count := surface.count(candidate)) <= errors:
                at, errors = candidate, count
    return at


def _best_on_line(surface, at, direction, low, high) -> np.ndarray | None:
    """The best point of a line inside the box, or None where the box cuts the line to nothing."""
    moving = direction != 0
    ends = np.stack([(low - at)[moving] / direction[moving], (high - at)[moving] / direction[moving]])
    first, last = float(ends.min(0).max()), float(ends.max(0).min())
    if not first < last:
        return None
    return (at + surface.line_search(at, direction, first, last).x * direction).clip(low, high)
