from __future__ import annotations

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.wer import distances, oracle_errors, score_corpus

sentences = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)
filled = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.tuples(filled, sentences), min_size=1, max_size=6))
def test_counts_are_those_of_jiwer(pairs):
    refs, hyps = map(list, zip(*pairs))
    ours, theirs = score_corpus(refs, hyps, "levenshtein"), jiwer.process_words(refs, hyps)
    assert ours.wer == pytest.approx(theirs.wer)
    counts = ours.totals()
    assert counts["substitutions"] == theirs.substitutions
    assert counts["deletions"] == theirs.deletions
    assert counts["insertions"] == theirs.insertions
    assert counts["ref_words"] == theirs.hits + theirs.substitutions + theirs.deletions


@given(sentences, st.lists(sentences, min_size=1, max_size=5))
def test_distances_are_the_errors_of_the_alignment(ref, hyps):
    for alignment in ("sclite", "levenshtein"):
        pad = score_corpus([ref, "a"] * len(hyps), [x for h in hyps for x in (h, "a")], alignment)
        assert distances(ref, hyps, alignment).tolist() == pad.errors[::2].tolist()
        assert oracle_errors(ref, hyps, alignment) == pad.errors[::2].min()


def test_hand_worked_counts():
    # a b c d against a x c: b -> x substituted, d deleted; then e inserted after an empty reference.
    errors = score_corpus(["a b c d", ""], ["a x c", "e"])
    assert errors.totals() == {
        "errors": 3, "substitutions": 1, "deletions": 1, "insertions": 1, "ref_words": 4, "utterances": 2,
        "wrong_utterances": 2,
    }  # fmt: skip
    assert errors.wer == 0.75


def test_bad_corpora():
    with pytest.raises(LowbitError, match="2 references but 1 hypotheses"):
        score_corpus(["a", "b"], ["a"])
    with pytest.raises(LowbitError, match="no word"):
        score_corpus([""], ["a"])
    with pytest.raises(LowbitError, match="one of sclite, levenshtein, not 'x'"):
        score_corpus(["a"], ["a"], "x")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "first_pass", "oracle"), [("atis/test", 8.17, 5.15), ("l2/dev", 32.90, 21.07), ("swbd/test", 15.87, 12.39)]
)
def test_real_lists(data_dir, name, first_pass, oracle):
    from lowbit.nbest import read_nbest

    lists = list(read_nbest(data_dir / f"{name}.jsonl"))
    # The published figures count the fewest errors; sclite's alignment has two more on Switchboard.
    errors = score_corpus([u.ref for u in lists], [u.hyps[0].text for u in lists], "levenshtein")
    best = sum(oracle_errors(u.ref, [h.text for h in u.hyps], "levenshtein") for u in lists)
    assert 100 * errors.wer == pytest.approx(first_pass, abs=0.005)
    assert 100 * best / errors.ref_words.sum() == pytest.approx(oracle, abs=0.005)
