"""The best plan within a budget: the knapsack over exact file bytes, or over mean bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from lowbit.errors import LowbitError
from lowbit.plan import Plan
from lowbit.tables import effective_bits
from lowbit.tools.search.choices import CHOICES, make_plan
from lowbit.tools.search.filesize import FileSize
from lowbit.tools.search.knapsack import Solution, ranked, relaxed_cost, solve

Costs = Mapping[str, Mapping[str, float]]  # matrix -> choice -> cost
_TERNARY_UNITS = 5  # mean bits in fifths: 1.6 bits a ternary weight are an integer
_RANDOM_DRAWS, _RANDOM_SHARE = 20_000, 0.995


@dataclass(frozen=True)
class Budget:
    """A ceiling on file bytes, or on mean bits a weight.

    Attributes:
        nbytes: of the packed file, every byte counted; None for a budget of mean bits.
    """

    size: FileSize
    nbytes: int | None = None
    mean_bits: float | None = None

    @classmethod
    def of_ratio(cls, size: FileSize, ratio: float) -> Budget:
        """At least ``ratio`` times smaller than the fp32 checkpoint."""
        if not 0 < ratio < float("inf"):
            raise LowbitError(f"the ratio must be a positive number, not {ratio}")
        return cls(size, int(Fraction(size.fp32_nbytes) / Fraction(ratio)))

    def holds(self, plan: Plan) -> bool:
        if self.nbytes is not None:
            return self.size.nbytes(plan) <= self.nbytes
        return plan.mean_bits(self.size.config) <= self.mean_bits * (1 + 1e-12)

    def problem(self, choices: Sequence[str]) -> tuple[list[list[int]], int]:
        """(weights of every matrix's choices, capacity): necessary for a plan to fit, and nearly sufficient."""
        size, shapes = self.size, self.size.config.matrix_shapes()
        if self.nbytes is None:
            unit = [round(_TERNARY_UNITS * effective_bits(CHOICES[c].bits, CHOICES[c].table)) for c in choices]
            total = sum(n * k for n, k in shapes.values())
            capacity = int(Fraction(self.mean_bits * (1 + 1e-12)) * total * _TERNARY_UNITS)
            return [[n * k * u for u in unit] for n, k in shapes.values()], capacity
        weights = [[size.additive(m, CHOICES[c]) for c in choices] for m in shapes]
        lightest = {m: min(choices, key=lambda c: CHOICES[c].nbytes(*shape)) for m, shape in shapes.items()}
        return weights, self.nbytes - size.least_rest(make_plan(lightest, {}))

    def describe(self) -> dict[str, Any]:
        return {"bytes": self.nbytes} if self.nbytes is not None else {"mean_bits": self.mean_bits}


class Allocation:
    """The exact optimum of additive costs within a budget.

    Raises:
        LowbitError: not even the smallest plan fits.
    """

    def __init__(self, budget: Budget, costs: Costs, choices: Sequence[str], source: dict[str, Any]):
        self.budget, self.choices, self.source = budget, list(choices), source
        self.matrices = list(budget.size.config.matrix_shapes())
        self.weights, self.capacity = budget.problem(choices)
        self.costs = [[float(costs[m][c]) for c in choices] for m in self.matrices]
        solutions = self._fitting()
        try:
            self.best = next(solutions)
        except StopIteration:
            raise LowbitError(f"no plan fits: {self._least()}") from None
        self.plan = self._plan(self.best)
        self._others = solutions

    def summary(self, runner_up: bool = True) -> dict[str, Any]:
        """Cost, lower bound, and the second best plan with where it differs."""
        bound = relaxed_cost(self.weights, self.costs, self.capacity)
        out: dict[str, Any] = {"cost": self.best.cost, "bound": bound, "runner_up": None}
        if runner_up and (second := next(self._others, None)) is not None:
            changed = {
                m: self.choices[b]
                for m, a, b in zip(self.matrices, self.best.choice, second.choice)
                if a != b
            }  # fmt: skip
            out["runner_up"] = {"cost": second.cost, "changes": changed}
        return out

    def _fitting(self) -> Iterator[Solution]:
        """Solutions in the order of cost whose plan fits to the byte."""
        first = solve(self.weights, self.costs, self.capacity)
        if first is None:
            return
        for solution in ranked(self.weights, self.costs, self.capacity):
            if self.budget.holds(self._plan(solution)):
                yield solution

    def _plan(self, solution: Solution) -> Plan:
        return make_plan({m: self.choices[i] for m, i in zip(self.matrices, solution.choice)}, self.source)

    def _least(self) -> str:
        lightest = make_plan(
            {m: self.choices[min(range(len(w)), key=w.__getitem__)] for m, w in zip(self.matrices, self.weights)}, {}
        )
        if self.budget.nbytes is None:
            least, asked = f"{lightest.mean_bits(self.budget.size.config):.3f} bits", self.budget.mean_bits
        else:
            least, asked = f"{self.budget.size.nbytes(lightest):,} bytes", f"{self.budget.nbytes:,}"
        return f"the smallest one takes {least}, the budget is {asked}"


def random_plan(budget: Budget, choices: Sequence[str], seed: int, source: dict[str, Any]) -> Plan:
    """A plan drawn at random that fills the budget to within half a percent.

    Every matrix draws its choice by itself with P(choice) proportional to exp(-lambda * weight): of all distributions
    with the budget as mean weight the one of most entropy. The first draw that fits and fills is taken.

    Raises:
        LowbitError: not even the smallest plan fits.
    """
    weights, capacity = budget.problem(choices)
    if capacity < sum(map(min, weights)):
        raise LowbitError("no plan fits: the budget is less than the smallest plan takes")
    table = np.array(weights, dtype=float)
    probabilities = _tilted(table, capacity)
    rng = np.random.default_rng(seed)
    draws = (rng.random((_RANDOM_DRAWS, len(table), 1)) > probabilities.cumsum(1)[None, :, :-1]).sum(2)
    totals = table[np.arange(len(table)), draws].sum(1)
    matrices = list(budget.size.config.matrix_shapes())
    # The first that fills the budget; should none, the fullest that fits; the lightest always does.
    order = [*np.flatnonzero((totals <= capacity) & (totals >= _RANDOM_SHARE * capacity)), *np.argsort(-totals)]
    for row in [*draws[order], table.argmin(1)]:
        plan = make_plan({m: choices[i] for m, i in zip(matrices, row)}, source)
        if budget.holds(plan):
            return plan
    raise LowbitError("no plan fits: the budget is less than the smallest plan takes")


def _tilted(table: np.ndarray, capacity: float) -> np.ndarray:
    """P [matrices, choices] proportional to exp(-lambda * weight), lambda such that the mean total is ``capacity``."""
    scaled = table / table.max()
    low, high = -1e5, 1e5
    for _ in range(200):
        middle = (low + high) / 2
        logits = -middle * scaled
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        low, high = (middle, high) if (p * table).sum() > capacity else (low, middle)
    return p


def inverse_costs(costs: Costs, squared_errors: Costs) -> dict[str, dict[str, float]]:
    """Costs of a search that believes the opposite: cost = s * error becomes error / s, where s is the sensitivity.

    Matrices that suffer most get fewest bits; the control that shows whether sensitivities carry information.
    """
    tiny = min((v for row in costs.values() for v in row.values() if v > 0), default=1.0)
    return {m: {c: squared_errors[m][c] ** 2 / max(cost, tiny) for c, cost in row.items()} for m, row in costs.items()}
