"""Word error rate, its bootstrap interval, and the MAPSSWE test between two systems (DESIGN section 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from lowbit.errors import LowbitError, check_seed


@dataclass(frozen=True, eq=False)
class WordErrors:
    """Errors of one system on a corpus, utterance by utterance; every array is int64 [U].

    The counts are those of a minimal (unit cost) alignment, as jiwer counts them.
    """

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
        }


def _letters(sentences: Iterable[str]) -> list[str]:
    """Every word as one character, equal words the same: rapidfuzz is fastest on strings."""
    ids: dict[str, int] = {}
    return ["".join([chr(ids.setdefault(w, len(ids))) for w in s.split()]) for s in sentences]


def distances(ref: str, hyps: Sequence[str]) -> np.ndarray:
    """int64 [H]: word errors (unit-cost edit distance) of every hypothesis against ``ref``."""
    source, *targets = _letters([ref, *hyps])
    return np.array([Levenshtein.distance(source, t) for t in targets], dtype=np.int64)


def score_corpus(refs: Sequence[str], hyps: Sequence[str]) -> WordErrors:
    """Align every hypothesis with its reference.

    Raises:
        LowbitError: different numbers of them, or no reference word at all.
    """
    if len(refs) != len(hyps):
        raise LowbitError(f"{len(refs)} references but {len(hyps)} hypotheses")
    counts = np.zeros((4, len(refs)), np.int64)
    column = {"replace": 0, "delete": 1, "insert": 2}
    for i, (ref, hyp) in enumerate(zip(refs, hyps)):
        counts[3, i] = len(ref.split())
        if ref == hyp:
            continue
        for op, _, _ in Levenshtein.editops(*_letters((ref, hyp))).as_list():
            counts[column[op], i] += 1
    if not counts[3].sum():
        raise LowbitError("the references hold no word: a word error rate is not defined")
    return WordErrors(*counts)


def oracle_errors(ref: str, hyps: Sequence[str]) -> int:
    """Errors of the best hypothesis of a list."""
    return int(distances(ref, hyps).min())


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval; ``below_zero`` is the share of resamples below 0 (differences only)."""

    low: float
    high: float
    level: float
    resamples: int
    below_zero: float | None = None


def bootstrap(
    errors: np.ndarray,
    ref_words: np.ndarray,
    other: np.ndarray | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a WER, or of the difference WER(errors) - WER(other) of two systems on the same utterances.

    Utterances are resampled with replacement, both systems with the same ones (Bisani and Ney, ICASSP 2004).

    Args:
        errors, ref_words, other: int [U], per utterance.
    """
    check_seed(seed)
    rng = np.random.default_rng(seed)
    gain = errors if other is None else errors - other
    count = len(ref_words)
    rates = np.empty(resamples)
    rows = max(1, 2**22 // count)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, count, size=(min(rows, resamples - start), count))
        # A resample of empty references only has no rate; with any realistic corpus it never occurs.
        rates[start : start + rows] = gain[drawn].sum(1) / np.maximum(ref_words[drawn].sum(1), 1)
    tail = (1 - level) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return Interval(float(low), float(high), level, resamples, None if other is None else float((rates < 0).mean()))


@dataclass(frozen=True)
class Mapsswe:
    """Matched-pair sentence-segment word error test.

    Attributes:
        segments: segments with an error of either system.
        mean: mean of errors(A) - errors(B) over the segments; negative where A is better.
        std: its standard deviation (n - 1).
        z: mean / (std / sqrt(segments)); 0 where the differences do not vary, as in NIST sctk.
        p: two-sided probability of |z| under the standard normal distribution.
    """

    segments: int
    mean: float
    std: float
    z: float
    p: float


MIN_CORRECT = 2  # words, correct in both systems, that separate two segments (Gillick and Cox; NIST's default)


def _errors_by_slot(ref: str, a: str, b: str) -> np.ndarray:
    """int64 [2, 2 n + 1]: errors of both systems; slot 2 i + 1 is reference word i, 2 i the insertions before it."""
    source, *targets = _letters((ref, a, b))
    slots = np.zeros((2, 2 * len(source) + 1), np.int64)
    for row, target in zip(slots, targets):
        for op, i, _ in Levenshtein.editops(source, target).as_list():
            row[2 * i + (op != "insert")] += 1
    return slots


def segment_errors(ref: str, a: str, b: str) -> list[tuple[int, int]]:
    """Errors of two systems in every segment of an utterance.

    A segment holds at least one error and ends where ``MIN_CORRECT`` successive reference words are correct in both
    systems with nothing inserted between them, so that the errors of different segments may be taken as independent
    (Gillick and Cox, ICASSP 1989).
    """
    slots = _errors_by_slot(ref, a, b)
    wrong = slots.any(0)
    segments: list[tuple[int, int]] = []
    current, correct, is_open = np.zeros(2, np.int64), 0, False
    for slot in range(slots.shape[1]):
        if wrong[slot]:
            current, correct, is_open = current + slots[:, slot], 0, True
        elif slot % 2:
            correct += 1
            if is_open and correct == MIN_CORRECT:
                segments.append((int(current[0]), int(current[1])))
                current, is_open = np.zeros(2, np.int64), False
    if is_open:
        segments.append((int(current[0]), int(current[1])))
    return segments


def mapsswe(refs: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Mapsswe:
    """Test whether two systems differ: the mean difference of their segments' errors against 0 (Gillick and Cox)."""
    if not len(refs) == len(a) == len(b):
        raise LowbitError(f"{len(refs)} references, {len(a)} and {len(b)} hypotheses: the test needs matched pairs")
    pairs = [s for row in zip(refs, a, b) if row[0] != row[1] or row[0] != row[2] for s in segment_errors(*row)]
    difference = np.array([x - y for x, y in pairs], dtype=np.float64)
    n = len(difference)
    mean = float(difference.mean()) if n else 0.0
    std = float(difference.std(ddof=1)) if n > 1 else 0.0
    z = mean / (std / math.sqrt(n)) if std else 0.0
    return Mapsswe(n, mean, std, z, math.erfc(abs(z) / math.sqrt(2)))
