from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowbit.errors import LowbitError
from lowbit.significance import bootstrap, mapsswe, segment_errors
from lowbit.wer import score_corpus

sentences = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)
filled = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("ref", "a", "b", "expected"),
    [
        # Both right: no segment.
        ("a b c", "a b c", "a b c", []),
        # One correct word between two errors does not end a segment, two do.
        ("a b c d", "x b y d", "a b c d", [(2, 0)]),
        ("a b c d e", "x b c y e", "a b c d e", [(1, 0), (1, 0)]),
        # The words must be correct in both systems.
        ("a b c d e", "x b c y e", "a z c d e", [(2, 1)]),
        # An insertion between them breaks a run of correct words.
        ("a b c d e", "x b i c y e", "a b c d e", [(3, 0)]),
        # Insertions at the ends, an empty reference, a segment that ends with the utterance.
        ("a b", "i a b", "a b i", [(1, 0), (0, 1)]),
        ("", "i j", "k", [(2, 1)]),
        ("a b c", "a b", "a b c", [(1, 0)]),
    ],
)
def test_segments(ref, a, b, expected):
    assert segment_errors(ref, a, b) == expected


@given(st.lists(st.tuples(filled, sentences, sentences), min_size=1, max_size=5))
def test_segments_hold_all_errors(rows):
    refs, a, b = map(list, zip(*rows))
    pairs = [p for row in rows for p in segment_errors(*row)]
    assert all(x + y > 0 for x, y in pairs)
    for side, hyps in enumerate((a, b)):
        assert sum(p[side] for p in pairs) == score_corpus(refs, hyps).errors.sum()


def test_mapsswe_by_hand_and_by_scipy():
    # Segments' differences 1, 1, 1, -1, 2: mean 0.8, variance (0.04 * 3 + 3.24 + 1.44) / 4 = 1.2,
    # z = 0.8 / sqrt(1.2 / 5) = 1.63299, two-sided p = 0.10247.
    ref = ["a b c d e", "a b c", "a b c d e", "a b c"]
    first = ["x b c y e", "x b c", "a b c d e", "x y c"]
    second = ["a b c d e", "a b c", "a b x d e", "a b c"]
    result = mapsswe(ref, first, second)
    assert result.segments == 5
    assert result.mean == pytest.approx(0.8)
    assert result.std == pytest.approx(math.sqrt(1.2))
    assert result.z == pytest.approx(1.632993, abs=1e-6)
    assert result.p == pytest.approx(0.102470, abs=1e-6)
    # sctk's table has a row for 1.63 and none for 1.633.
    assert result.p_sctk == pytest.approx(2 * stats.norm.sf(1.63))
    difference = np.array([1, 1, 1, -1, 2])
    t = stats.ttest_1samp(difference, 0.0)
    # The same statistic as Student's, judged by the normal distribution.
    assert result.z == pytest.approx(t.statistic)
    assert result.p == pytest.approx(2 * stats.norm.sf(abs(t.statistic)))


def test_mapsswe_of_equal_systems():
    result = mapsswe(["a b"], ["a x"], ["a x"])
    assert (result.segments, result.z, result.p) == (1, 0.0, 1.0)
    assert mapsswe(["a"], ["a"], ["a"]).p == 1.0


def test_mapsswe_needs_matched_pairs():
    with pytest.raises(LowbitError, match="matched pairs"):
        mapsswe(["a"], ["a"], [])


def test_bootstrap_covers_what_the_normal_approximation_does():
    rng = np.random.default_rng(0)
    words = np.full(2000, 10)
    errors = rng.binomial(10, 0.1, 2000)
    interval = bootstrap(errors, words, resamples=2000)
    rate, half = errors.sum() / words.sum(), 1.96 * errors.std() / math.sqrt(2000) / 10
    # The ends are quantiles of 2000 draws: their standard error is about 3 % of the half width.
    assert interval.low == pytest.approx(rate - half, abs=0.15 * half)
    assert interval.high == pytest.approx(rate + half, abs=0.15 * half)
    assert interval == bootstrap(errors, words, resamples=2000)


def test_paired_bootstrap_sees_a_constant_gain():
    errors = np.random.default_rng(1).integers(1, 9, 300)
    interval = bootstrap(errors - 1, np.full(300, 10), errors)
    assert interval.low == pytest.approx(-0.1) and interval.high == pytest.approx(-0.1)
    assert interval.below_zero == 1.0
