"""tools/search/knapsack.py against brute force and scipy's mixed-integer solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.tools.search.knapsack import ranked, relaxed_cost, solve

# Eighths: sums are exact, so that costs may be compared without a tolerance.
eighths = st.integers(-400, 4000).map(lambda i: i / 8)


@st.composite
def problems(draw, items=6, choices=4):
    sizes = draw(st.lists(st.integers(1, choices), min_size=1, max_size=items))
    weights = [draw(st.lists(st.integers(0, 60), min_size=n, max_size=n)) for n in sizes]
    costs = [draw(st.lists(eighths, min_size=n, max_size=n)) for n in sizes]
    return weights, costs, draw(st.integers(0, 60 * len(sizes)))


def brute_force(weights, costs, capacity):
    """All (cost, choice) within the capacity, cheapest first."""
    found = []
    for choice in itertools.product(*(range(len(w)) for w in weights)):
        if sum(w[i] for w, i in zip(weights, choice)) <= capacity:
            found.append((sum(c[i] for c, i in zip(costs, choice)), choice))
    return sorted(found)


@given(problems())
@settings(max_examples=300)
def test_optimum_is_that_of_brute_force(problem):
    weights, costs, capacity = problem
    found, all_of_them = solve(*problem), brute_force(*problem)
    if not all_of_them:
        assert found is None
        return
    assert found.cost == all_of_them[0][0]
    assert found.cost == sum(c[i] for c, i in zip(costs, found.choice))
    assert found.weight == sum(w[i] for w, i in zip(weights, found.choice)) <= capacity
    assert relaxed_cost(*problem) <= found.cost + 1e-9


@given(problems(items=4, choices=3))
@settings(max_examples=100)
def test_ranked_lists_every_solution_in_order(problem):
    listed = list(ranked(*problem))
    assert [s.cost for s in listed] == [cost for cost, _ in brute_force(*problem)]
    assert len({s.choice for s in listed}) == len(listed)


def milp_optimum(weights, costs, capacity) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(w) for w in weights]
    one_each = np.zeros((len(sizes), sum(sizes)))
    for row, start, n in zip(one_each, np.cumsum([0, *sizes]), sizes):
        row[start : start + n] = 1
    result = milp(
        np.concatenate(costs), integrality=np.ones(sum(sizes)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(weights), ub=capacity)],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    assert result.status == 0
    return result.fun


@pytest.mark.parametrize("seed", range(6))
def test_optimum_is_that_of_scipy(seed):
    """Forty matrices with weights of hundreds of kilobytes and costs over six decades: what real models bring."""
    rng = np.random.default_rng(seed)
    items = 40
    base = rng.choice([65_536, 262_144, 2_560_000], items)
    weights = [[int(b * bits / 8) + int(rng.integers(500)) for bits in (1, 1.6, 2, 4, 8)] for b in base]
    costs = [(10 ** rng.uniform(-6, 0) * np.array([1, 0.6, 0.35, 0.03, 1e-4])).tolist() for _ in base]
    capacity = int(sum(w[0] for w in weights) * rng.uniform(1.1, 4))
    found = solve(weights, costs, capacity)
    # HiGHS accepts constraints violated by 1e-6 and stops at a gap of 1e-6 of the objective at worst.
    assert found.cost == pytest.approx(milp_optimum(weights, costs, capacity), rel=1e-6)
    assert relaxed_cost(weights, costs, capacity) <= found.cost * (1 + 1e-9)


def test_ties_and_a_single_item():
    assert solve([[5, 5, 5]], [[1.0, 1.0, 0.5]], 5).choice == (2,)
    assert solve([[5]], [[1.0]], 4) is None
    assert solve([[0, 0], [0, 0]], [[2.0, 1.0], [-3.0, 0.0]], 0).choice == (1, 0)
