"""Is the difference real? Paired bootstrap intervals of word error rates, and the MAPSSWE test between two systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.align import CORRECT, INSERTION, align, letters
from lowbit.errors import LowbitError, check_seed


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
    rows = max(1, 2**20 // count)
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
        p_sctk: what sc_stats prints, to three digits: it looks p up in a table at |z| cut to two decimals.
    """

    segments: int
    mean: float
    std: float
    z: float
    p: float
    p_sctk: float


MIN_CORRECT = 2  # words, correct in both systems, that separate two segments (Gillick and Cox; NIST's default)
_TABLE_END = 5.14  # of sctk's table of the normal distribution


def _errors_by_slot(words: Sequence[str], hyps: Sequence[str], alignment: str) -> np.ndarray:
    """int64 [2, 2 n + 1]: errors of both systems; slot 2 i + 1 is reference word i, 2 i the insertions before it."""
    slots = np.zeros((2, 2 * len(words) + 1), np.int64)
    for row, hyp in zip(slots, hyps):
        at = 0
        for edit in align(words, hyp, alignment):
            if edit == INSERTION:
                row[2 * at] += 1
                continue
            row[2 * at + 1] = edit != CORRECT
            at += 1
    return slots


def segment_errors(ref: str, a: str, b: str, alignment: str = "sclite") -> list[tuple[int, int]]:
    """Errors of two systems in every segment of an utterance.

    A segment holds at least one error and ends where ``MIN_CORRECT`` successive reference words are correct in both
    systems with nothing inserted between them, so that the errors of different segments may be taken as independent
    (Gillick and Cox, ICASSP 1989).
    """
    source, *targets = letters((ref.split(), a.split(), b.split()))
    if targets[0] == targets[1] == source:
        return []
    slots = _errors_by_slot(source, targets, alignment)
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


def mapsswe(refs: Sequence[str], a: Sequence[str], b: Sequence[str], alignment: str = "sclite") -> Mapsswe:
    """Test whether two systems differ: the mean difference of their segments' errors against 0 (Gillick and Cox)."""
    if not len(refs) == len(a) == len(b):
        raise LowbitError(f"{len(refs)} references, {len(a)} and {len(b)} hypotheses: the test needs matched pairs")
    return mapsswe_of_segments([x - y for row in zip(refs, a, b) for x, y in segment_errors(*row, alignment)])


def mapsswe_of_segments(differences: Sequence[int]) -> Mapsswe:
    """The test on differences of errors, one a segment (:func:`segment_errors`)."""
    difference = np.asarray(differences, dtype=np.float64)
    n = len(difference)
    mean = float(difference.mean()) if n else 0.0
    std = float(difference.std(ddof=1)) if n > 1 else 0.0
    z = mean / (std / math.sqrt(n)) if std else 0.0
    # 1e-9: 1.64 is a little less than 164 hundredths in the machine.
    cut = min(math.floor(abs(z) * 100 + 1e-9) / 100, _TABLE_END)
    return Mapsswe(n, mean, std, z, _two_sided(abs(z)), _two_sided(cut))


def _two_sided(z: float) -> float:
    return math.erfc(z / math.sqrt(2))
