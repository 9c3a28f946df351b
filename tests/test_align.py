from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.align import align, count_edits, letters
from lowbit.errors import LowbitError

words = st.lists(st.sampled_from("abc"), max_size=10)


def cheapest(ref: list[str], hyp: list[str], gap: int, substitution: int) -> int:
    """Least cost of an alignment, by the textbook recursion."""
    cost = [[gap * (i + j) for j in range(len(hyp) + 1)] for i in range(len(ref) + 1)]
    for i, r in enumerate(ref, 1):
        for j, h in enumerate(hyp, 1):
            diagonal = cost[i - 1][j - 1] + substitution * (r != h)
            cost[i][j] = min(diagonal, cost[i - 1][j] + gap, cost[i][j - 1] + gap)
    return cost[-1][-1]


def replay(ref: list[str], edits: str, hyp: list[str]) -> None:
    """The edits lead from ref to hyp, word by word."""
    i = j = 0
    for edit in edits:
        if edit in "CS":
            assert (ref[i] == hyp[j]) == (edit == "C")
        i, j = i + (edit != "I"), j + (edit != "D")
    assert (i, j) == (len(ref), len(hyp))


@given(words, words)
def test_alignments_are_valid_and_cheapest(ref, hyp):
    for alignment, gap, substitution in (("sclite", 3, 4), ("levenshtein", 1, 1)):
        edits = align(ref, hyp, alignment)
        replay(ref, edits, hyp)
        cost = gap * (edits.count("D") + edits.count("I")) + substitution * edits.count("S")
        assert cost == cheapest(ref, hyp, gap, substitution)
        counts = count_edits(*letters((ref, hyp)), alignment)
        assert counts == (edits.count("S"), edits.count("D"), edits.count("I"))


@pytest.mark.parametrize(
    ("ref", "hyp", "edits"),
    [
        # Read off sclite 2.10's alignments of the same words.
        ("a b c d e", "a x x d e f", "CSSCCI"),
        ("a b c d", "b c d", "DCCC"),
        # Three substitutions and two deletions with two insertions cost the same, 12: the diagonal is preferred.
        ("a b c d", "x y z d", "SSSC"),
        ("a b c d", "d x y z", "SSSS"),
        ("", "a b", "II"),
        ("a b", "", "DD"),
        ("", "", ""),
    ],
)
def test_known_alignments(ref, hyp, edits):
    assert align(ref.split(), hyp.split()) == edits


def test_counts_differ_from_levenshtein_where_gaps_are_cheaper():
    # At weights 4/3/3 five gaps cost 15, like three substitutions and a gap, which are the fewest errors (4).
    ref, hyp = list("cccba"), list("baab")
    assert align(ref, hyp) == "DDDCICI"
    assert align(ref, hyp, "levenshtein").count("C") == 1
    assert sum(count_edits(*letters((ref, hyp)))) == 5
    assert sum(count_edits(*letters((ref, hyp)), "levenshtein")) == 4


def test_unknown_alignment():
    with pytest.raises(LowbitError, match="must be one of sclite, levenshtein, not 'dtw'"):
        align(["a"], ["b"], "dtw")
