from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.tune import ErrorSurface, tune


def random_surface(seed: int, utterances: int = 20, n_features: int = 2, ties: bool = False) -> ErrorSurface:
    """Lists of 1 to 6 hypotheses; with ``ties`` small whole numbers, so that lines coincide and cross together."""
    rng = np.random.default_rng(seed)
    base, features, errors = [], [], []
    for _ in range(utterances):
        n = int(rng.integers(1, 7))
        numbers = rng.standard_normal((n_features + 1, n))
        numbers = (2 * numbers).round() if ties else numbers
        base.append(numbers[0])
        features.append(numbers[1:])
        errors.append(rng.integers(0, 9, n))
    return ErrorSurface(base, features, errors)


@given(st.integers(0, 10_000), st.booleans())
def test_steps_are_the_errors_everywhere(seed, ties):
    surface = random_surface(seed, ties=ties)
    rng = np.random.default_rng(seed)
    origin, direction = rng.standard_normal((2, 2))
    if ties:
        # Halves: sums are exact, so lines that coincide on paper coincide in the machine.
        origin, direction = (2 * origin).round() / 2, (2 * direction).round() / 2
    breaks, errors = surface.steps(origin, direction)
    assert (np.diff(breaks) > 0).all() and len(errors) == len(breaks) + 1
    edges = np.concatenate([[breaks[0] - 2], breaks, [breaks[-1] + 2]]) if len(breaks) else np.array([-1.0, 1.0])
    for left, right, expected in zip(edges, edges[1:], errors):
        # Rounding moves a break by about 1e-15 relative to terms of at most 10; and x on a coarse dyadic grid keeps
        # the sums of coinciding lines equal.
        x = round((left + right) / 2 * 1024) / 1024
        if left + 1e-9 < x < right - 1e-9:
            assert surface.count(origin + x * direction) == expected


@given(st.integers(0, 10_000))
def test_line_search_is_never_worse_than_a_fine_grid(seed):
    surface = random_surface(seed)
    origin, direction = np.zeros(2), np.array([1.0, 0.0])
    point = surface.line_search(origin, direction, 0.0, 10.0)
    grid = min(surface.count(origin + x * direction) for x in np.linspace(0, 10, 401))
    assert point.errors <= grid
    assert surface.count(origin + point.x * direction) == point.errors
    # The plateau really is one: the same errors at both of its inner ends.
    for share in (-0.49, 0.49):
        assert surface.count(origin + (point.x + share * point.width) * direction) == point.errors


@pytest.mark.parametrize("seed", range(5))
def test_tuning_beats_a_two_dimensional_grid(seed):
    surface = random_surface(seed, utterances=40)
    weights = tune(surface, lower=(0.0, -np.inf), seed=1)
    # A grid of 30 x 61 points in the region where the features matter.
    grid = min(surface.count(np.array([x, y])) for x in np.linspace(0, 3, 30) for y in np.linspace(-3, 3, 61))
    assert weights[0] >= 0
    assert surface.count(weights) <= min(grid, surface.count(np.zeros(2)))
    assert np.array_equal(weights, tune(surface, lower=(0.0, -np.inf), seed=1))


def test_tuning_takes_the_middle_of_the_plateau():
    # The second hypothesis wins for w > 1 and the third for w > 3; the second has no error.
    surface = ErrorSurface([np.array([2.0, 1.0, -2.0])], [np.array([[0.0, 1.0, 2.0]])], [np.array([1, 0, 2])])
    assert tune(surface, lower=(0.0,)) == pytest.approx([2.0])


def test_tuning_without_gain_never_loses():
    # The first hypothesis is always right.
    surface = ErrorSurface([np.array([0.0, 0.0])] * 3, [np.array([[0.0, 1.0]])] * 3, [np.array([0, 4])] * 3)
    assert surface.count(tune(surface, lower=(0.0,))) == 0
    same = ErrorSurface([np.array([0.0])], [np.array([[1.0]])], [np.array([2])])
    assert surface.n_features == 1 and same.count(tune(same, lower=(0.0,))) == 2


def test_nothing_to_tune_on():
    with pytest.raises(LowbitError, match="without utterances"):
        ErrorSurface([], [], [])
