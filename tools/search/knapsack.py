"""The multiple-choice knapsack: one choice an item, least total cost, total weight within a capacity; exact.

Dynamic programme over states (weight, cost), of which only undominated ones are kept, so weights need no unit and no
table as long as the capacity; states that the linear relaxation of the remaining items proves hopeless are dropped
(Kellerer, Pferschy and Pisinger 2004, chapter 11). Solutions can be listed in the order of their cost (Murty 1968).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SLACK = 1e-12  # relative: rounding of sums must not drop the optimum


@dataclass(frozen=True)
class Solution:
    """``choice[i]`` of every item, their total cost and weight."""

    choice: tuple[int, ...]
    cost: float
    weight: int


class Relaxation:
    """Linear relaxation of every suffix of the items: the least cost of items i .. n-1 as a function of capacity.

    It is convex and piecewise linear: the lower convex hulls of the items, their segments merged in order of slope.
    """

    def __init__(self, weights: Sequence[np.ndarray], costs: Sequence[np.ndarray]):
        hulls = [_lower_hull(w, c) for w, c in zip(weights, costs)]
        self.curves: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(1), np.zeros(1))]
        start_w = start_c = 0.0
        steps = np.zeros((0, 2))
        for w, c in reversed(hulls):
            start_w, start_c = start_w + w[0], start_c + c[0]
            steps = np.concatenate([steps, np.stack([np.diff(w), np.diff(c)], 1)])
            order = steps[np.argsort(steps[:, 1] / steps[:, 0], kind="stable")]
            self.curves.append((start_w + np.r_[0, order[:, 0].cumsum()], start_c + np.r_[0, order[:, 1].cumsum()]))
        self.curves.reverse()

    def bound(self, first: int, capacity: np.ndarray | float) -> np.ndarray:
        """Least relaxed cost of items ``first`` .. n-1 within ``capacity``; infinite where none fit."""
        w, c = self.curves[first]
        return np.where(capacity < w[0], np.inf, np.interp(capacity, w, c))


def _lower_hull(weight: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the lower convex hull, weights rising and costs falling."""
    hull: list[tuple[float, float]] = []
    for w, c in sorted(zip(weight.tolist(), cost.tolist())):
        if hull and c >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (w - hull[-2][0]) >= (c - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((w, c))
    corners = np.array(hull, dtype=float)
    return corners[:, 0], corners[:, 1]


def solve(weights: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> Solution | None:
    """The cheapest choice within ``capacity``, or None where even the lightest one weighs more.

    Args:
        weights: of every item's choices, integers; costs: the same shape, finite, of any sign.
    """
    w = [np.asarray(x, dtype=np.int64) for x in weights]
    c = [np.asarray(x, dtype=np.float64) for x in costs]
    relaxation = Relaxation(w, c)
    if capacity < sum(int(x.min()) for x in w):
        return None
    limit = _greedy(w, c, capacity)
    limit += _SLACK * sum(float(np.abs(x).max()) for x in c)
    state_w, state_c = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (item_w, item_c) in enumerate(zip(w, c)):
        new_w = (state_w[:, None] + item_w).ravel()
        new_c = (state_c[:, None] + item_c).ravel()
        alive = np.flatnonzero(new_c + relaxation.bound(i + 1, capacity - new_w) <= limit)
        order = alive[np.lexsort((new_c[alive], new_w[alive]))]
        # Along rising weight only states cheaper than all lighter ones can be part of an optimum.
        ahead = np.minimum.accumulate(np.r_[np.inf, new_c[order][:-1]])
        kept = order[new_c[order] < ahead]
        back.append((kept // len(item_w), kept % len(item_w)))
        state_w, state_c = new_w[kept], new_c[kept]
    last = int(state_c.argmin())
    choice, at = [], last
    for parent, chosen in reversed(back):
        choice.append(int(chosen[at]))
        at = int(parent[at])
    choice.reverse()
    return Solution(tuple(choice), float(state_c[last]), int(state_w[last]))


def _greedy(w: Sequence[np.ndarray], c: Sequence[np.ndarray], capacity: int) -> float:
    """The cost of a feasible choice: steps of the hulls in order of slope, as far as they fit."""
    steps, weight, cost = [], 0.0, 0.0
    for i, (item_w, item_c) in enumerate(zip(w, c)):
        hull_w, hull_c = _lower_hull(item_w, item_c)
        weight, cost = weight + hull_w[0], cost + hull_c[0]
        steps += [(dc / dw, i, dw, dc) for dw, dc in zip(np.diff(hull_w), np.diff(hull_c))]
    stopped = set()
    for _, i, dw, dc in sorted(steps):
        if i in stopped or weight + dw > capacity:
            stopped.add(i)
        else:
            weight, cost = weight + dw, cost + dc
    return cost


def relaxed_cost(weights: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> float:
    """A lower bound of every solution's cost: the linear relaxation's."""
    arrays = [[np.asarray(x, float) for x in table] for table in (weights, costs)]
    return float(Relaxation(*arrays).bound(0, float(capacity)))


def ranked(weights: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> Iterator[Solution]:
    """All solutions within ``capacity`` in the order of their cost, each found when it is asked for.

    What is left after a solution is split into parts that cannot overlap: part j shares its choices of items before j
    and differs in item j.
    """

    def best(allowed: list[list[int]]) -> Solution | None:
        found = solve(
            [[w[a] for a in keep] for w, keep in zip(weights, allowed)],
            [[c[a] for a in keep] for c, keep in zip(costs, allowed)],
            capacity,
        )
        if found is None:
            return None
        return Solution(tuple(keep[a] for keep, a in zip(allowed, found.choice)), found.cost, found.weight)

    allowed = [list(range(len(w))) for w in weights]
    heap: list[tuple[float, int, Solution, list[list[int]], int]] = []
    count = 0

    def push(allowed: list[list[int]], fixed: int) -> None:
        nonlocal count
        if found := best(allowed):
            heapq.heappush(heap, (found.cost, count, found, allowed, fixed))
            count += 1

    push(allowed, 0)
    while heap:
        _, _, solution, allowed, fixed = heapq.heappop(heap)
        yield solution
        for j in range(fixed, len(allowed)):
            others = [a for a in allowed[j] if a != solution.choice[j]]
            if others:
                push([[a] for a in solution.choice[:j]] + [others] + allowed[j + 1 :], j)
