"""Word error rate: substitutions, deletions and insertions as NIST sclite counts them, and the oracle of a list."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.align import check_alignment, count_edits, letters
from lowbit.errors import LowbitError


@dataclass(frozen=True, eq=False)
class WordErrors:
    """Errors of one system on a corpus, utterance by utterance; every array is int64 [U]."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    ref_words: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Errors per reference word of the corpus, as a fraction."""
        return float(self.errors.sum() / self.ref_words.sum())

    def totals(self) -> dict[str, int]:
        return {
            "errors": int(self.errors.sum()),
            "substitutions": int(self.substitutions.sum()),
            "deletions": int(self.deletions.sum()),
            "insertions": int(self.insertions.sum()),
            "ref_words": int(self.ref_words.sum()),
            "utterances": len(self.ref_words),
            "wrong_utterances": int((self.errors > 0).sum()),
        }


class ErrorCounter:
    """Counts utterance by utterance; keeps 16 bytes of each.

    Args:
        alignment: "sclite" (weights 4/3/3) or "levenshtein" (unit costs, the fewest errors, as jiwer counts).
    """

    def __init__(self, alignment: str = "sclite"):
        check_alignment(alignment)
        self.alignment = alignment
        self._counts = array("i")

    def add(self, ref: str, hyp: str) -> tuple[int, int, int]:
        """Substitutions, deletions and insertions of one utterance."""
        source, target = ref.split(), hyp.split()
        edits = (0, 0, 0) if source == target else count_edits(*letters((source, target)), self.alignment)
        self._counts.extend((*edits, len(source)))
        return edits

    def result(self) -> WordErrors:
        """Raises LowbitError where the references hold no word."""
        counts = np.frombuffer(self._counts, np.int32).reshape(-1, 4).astype(np.int64)
        if not counts[:, 3].sum():
            raise LowbitError("the references hold no word: a word error rate is not defined")
        return WordErrors(*counts.T)


def score_corpus(refs: Sequence[str], hyps: Sequence[str], alignment: str = "sclite") -> WordErrors:
    """Align every hypothesis with its reference.

    Raises:
        LowbitError: different numbers of them, or no reference word at all.
    """
    if len(refs) != len(hyps):
        raise LowbitError(f"{len(refs)} references but {len(hyps)} hypotheses")
    counter = ErrorCounter(alignment)
    for ref, hyp in zip(refs, hyps):
        counter.add(ref, hyp)
    return counter.result()


def distances(ref: str, hyps: Sequence[str], alignment: str = "sclite") -> np.ndarray:
    """int64 [H]: word errors of every hypothesis against ``ref``."""
    source, *targets = letters([ref.split(), *(h.split() for h in hyps)])
    return np.array([sum(count_edits(source, t, alignment)) for t in targets], dtype=np.int64)


def oracle_errors(ref: str, hyps: Sequence[str], alignment: str = "sclite") -> int:
    """Errors of the best hypothesis of a list."""
    return int(distances(ref, hyps, alignment).min())
