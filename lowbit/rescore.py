"""N-best rescoring: weights, their tuning on a development list, and the word error rates before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lowbit.engine import LanguageModel, first_pass_kind, first_pass_scores
from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json, write_json
from lowbit.nbest import NBest
from lowbit.tune import ErrorSurface, tune
from lowbit.wer import distances, oracle_errors

WEIGHTS_VERSION = 1


@dataclass(frozen=True)
class Weights:
    """score = first pass + lm_weight * log P + length_bonus * words.

    Attributes:
        first_pass: what the weights were tuned against: "am" scores, or "rank" where a list had none. None where they
            were given by hand.
        tuned_on: list, model, utterances, and the WER before and after, of the tuning.
    """

    lm_weight: float
    length_bonus: float = 0.0
    first_pass: str | None = None
    tuned_on: dict[str, Any] = field(default_factory=dict)

    def save(self, path: PathLike) -> None:
        write_json(path, {"version": WEIGHTS_VERSION} | asdict(self))

    @classmethod
    def load(cls, path: PathLike) -> Weights:
        """Raises LowbitError: not a weights file, or numbers that are not finite."""
        values = read_json(path)
        if not isinstance(values, dict) or values.get("version") != WEIGHTS_VERSION:
            raise LowbitError(f"{path}: not a weights file of version {WEIGHTS_VERSION}; make one with --tune")
        for name in ("lm_weight", "length_bonus"):
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise LowbitError(f"{path}: {name!r} must be a finite number, not {value!r}")
        first_pass, tuned_on = values.get("first_pass"), values.get("tuned_on", {})
        if first_pass not in ("am", "rank", None) or not isinstance(tuned_on, dict):
            raise LowbitError(f"{path}: 'first_pass' must be \"am\", \"rank\" or null, and 'tuned_on' an object")
        return cls(float(values["lm_weight"]), float(values["length_bonus"]), first_pass, tuned_on)


@dataclass
class RescoringReport:
    """Counts over a list; the error fields stay None where the list has no references."""

    utterances: int = 0
    hypotheses: int = 0
    words: int = 0
    oov: int = 0
    first_pass: str | None = None
    ref_words: int | None = None
    first_pass_errors: int | None = None
    rescored_errors: int | None = None
    oracle_errors: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts, and WERs in percent."""
        rates = {}
        if self.ref_words:
            for name in ("first_pass", "rescored", "oracle"):
                rates[f"{name}_wer"] = 100 * getattr(self, f"{name}_errors") / self.ref_words
        return {k: v for k, v in asdict(self).items() if v is not None} | rates

    def add(self, before: NBest, after: NBest) -> None:
        self.utterances += 1
        self.hypotheses += len(before.hyps)
        self.words += sum(len(h.text.split()) for h in before.hyps)
        self.oov += after.extra["oov"]
        if before.ref is None:
            return
        if self.ref_words is None:
            self.ref_words = self.first_pass_errors = self.rescored_errors = self.oracle_errors = 0
        errors = distances(before.ref, [before.hyps[0].text, after.hyps[0].text])
        self.ref_words += len(before.ref.split())
        self.first_pass_errors += int(errors[0])
        self.rescored_errors += int(errors[1])
        self.oracle_errors += oracle_errors(before.ref, [h.text for h in before.hyps])


def rescore_stream(
    lm: LanguageModel, lists: Iterable[NBest], weights: Weights, report: RescoringReport, where: str = "N-best list"
) -> Iterator[NBest]:
    """Yield every list reordered, and count in ``report``; a few lists are in memory at a time.

    Raises:
        LowbitError: lists with and without ``am`` scores or references in one file, or weights that were tuned on the
            other kind of list.
    """
    pending: list[NBest] = []
    checked = _consistent(lists, weights, report, where, pending)
    for done in lm.iter_rescored(checked, weights.lm_weight, weights.length_bonus):
        report.add(pending.pop(0), done)
        yield done


def _consistent(
    lists: Iterable[NBest], weights: Weights, report: RescoringReport, where: str, pending: list[NBest]
) -> Iterator[NBest]:
    """Pass lists through, keeping each in ``pending``; all must be of one kind."""
    has_ref = None
    for utterance in lists:
        kind = first_pass_kind(utterance)
        if report.first_pass is None:
            report.first_pass, has_ref = kind, utterance.ref is not None
            if weights.first_pass not in (kind, None):
                raise LowbitError(
                    f"{where}: the first pass gives {kind}, the weights were tuned on {weights.first_pass}; tune again"
                )
        if kind != report.first_pass:
            raise LowbitError(f"{where}: utterance {utterance.id!r}: 'am' scores in some utterances but not in all")
        if (utterance.ref is not None) is not has_ref:
            raise LowbitError(f"{where}: utterance {utterance.id!r}: 'ref' in some utterances but not in all")
        pending.append(utterance)
        yield utterance


def tune_weights(
    lm: LanguageModel,
    lists: Sequence[NBest],
    where: str = "N-best list",
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Weights:
    """Find the weights with the fewest word errors on ``lists`` (:mod:`lowbit.tune`); the LM's is never negative.

    Args:
        where: the list's name, for errors and for the weights file.
        progress: called after every utterance that is scored.

    Raises:
        LowbitError: a list without references, or a mixture of kinds.
    """
    report = RescoringReport()
    base, features, errors = [], [], []
    # Weights of 0 keep the order, and the stream checks that all lists are of one kind.
    stream = _consistent(lists, Weights(0.0), report, where, [])
    batch: list[NBest] = []
    for utterance in stream:
        if utterance.ref is None:
            raise LowbitError(f"{where}: utterance {utterance.id!r} has no 'ref'; tuning needs references")
        batch.append(utterance)
    for start in range(0, len(batch), 64):
        part = batch[start : start + 64]
        for utterance, scores in zip(part, lm.score_nbest([[h.text for h in u.hyps] for u in part])):
            base.append(first_pass_scores(utterance))
            features.append(np.stack([scores.logprobs, scores.words.astype(np.float64)]))
            errors.append(distances(utterance.ref, [h.text for h in utterance.hyps]))
            progress()
    surface = ErrorSurface(base, features, errors)
    best = tune(surface, lower=(0.0, -math.inf), seed=seed)
    ref_words = sum(len(u.ref.split()) for u in batch)
    if not ref_words:
        raise LowbitError(f"{where}: the references hold no word")
    tuned_on = {
        "list": where,
        "model": lm.describe().get("path"),
        "utterances": len(batch),
        "seed": seed,
        "first_pass_wer": 100 * surface.count(np.zeros(2)) / ref_words,
        "rescored_wer": 100 * surface.count(best) / ref_words,
    }
    return Weights(float(best[0]), float(best[1]), report.first_pass, tuned_on)
