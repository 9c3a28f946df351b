"""N-best rescoring: what the models say of every hypothesis, the combined score, and word error rates on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from lowbit.engine import LanguageModel, NBestScores, first_pass_kind, first_pass_scores, reorder
from lowbit.errors import LowbitError
from lowbit.nbest_record import NBest
from lowbit.ngram import NGram
from lowbit.vocab import EOS
from lowbit.weights import Weights
from lowbit.wer import distances

_BATCH = 64  # utterances that are scored, and held, at a time


@dataclass(frozen=True, eq=False)
class Scored:
    """A list and what the models say of its hypotheses.

    Attributes:
        lm, ngram: None where there is no such model.
    """

    utterance: NBest
    lm: NBestScores | None
    ngram: NBestScores | None

    @property
    def words(self) -> np.ndarray:
        """int64 [H]."""
        return (self.lm or self.ngram).words

    @property
    def oov(self) -> np.ndarray:
        """int64 [H]: unknown words of the language model, or of the n-gram where that is alone."""
        return (self.lm or self.ngram).oov

    @property
    def first_lm(self) -> np.ndarray | None:
        """fp64 [H]: log P under the first pass's own language model, where every hypothesis has it."""
        values = [h.lm for h in self.utterance.hyps]
        return None if None in values else np.array(values)

    def columns(self) -> dict[str, np.ndarray]:
        """fp64 [H] each: the models' log-probabilities by the names that the output lists give them."""
        models = {"logprob": self.lm, "ngram_logprob": self.ngram}
        return {name: scores.logprobs for name, scores in models.items() if scores is not None}

    def language_score(self, weights: Weights) -> np.ndarray:
        """fp64 [H]: the interpolated log P (:class:`Weights`)."""
        w = weights.interpolation_weight
        if self.lm is None or self.ngram is None:
            return (self.lm or self.ngram).logprobs
        if weights.interpolation == "log":
            return w * self.lm.logprobs + (1 - w) * self.ngram.logprobs
        pairs = zip(self.lm.token_logprobs, self.ngram.token_logprobs)
        return np.array([mixture(a, b, w).sum() for a, b in pairs])

    def first_pass(self, weights: Weights) -> np.ndarray:
        """fp64 [H]: the recogniser's scores, or minus the rank where there are none."""
        scores = first_pass_scores(self.utterance)
        return scores * (self.words + 1) if weights.average_am else scores

    def combined(self, weights: Weights) -> np.ndarray:
        """fp64 [H]: the score that decides."""
        score = weights.acoustic_weight * self.first_pass(weights)
        score = score + weights.lm_weight * self.language_score(weights) + weights.length_bonus * self.words
        score = score + weights.unknown_weight * self.oov
        return score + weights.first_lm_weight * self.first_lm if weights.first_lm_weight else score


def mixture(a: np.ndarray, b: np.ndarray, w: float) -> np.ndarray:
    """log(w · e^a + (1 − w) · e^b), elementwise."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(a + np.log(w), b + np.log(1 - w))


class Scorer:
    """The models of a rescoring, together.

    Args:
        lm: the Transformer; None rescores with the n-gram alone.
        ngram: the n-gram model, or None.
        context: utterances of the same conversation, before each one, that the Transformer reads: their best
            hypotheses in the first pass, so that the context does not depend on the weights. The n-gram reads none.
        conversation: the field of an utterance that names its conversation.

    Raises:
        LowbitError: no model at all.
    """

    def __init__(
        self, lm: LanguageModel | None, ngram: NGram | None = None, context: int = 0, conversation: str = "conv"
    ):
        if lm is None and ngram is None:
            raise LowbitError("rescoring needs a language model, an n-gram model or both")
        if context < 0 or (context and lm is None):
            raise LowbitError("context: a number of utterances from 0, and a language model that reads them")
        self.lm, self.ngram, self.context, self.conversation = lm, ngram, context, conversation

    def describe(self) -> dict[str, Any]:
        return {
            "model": None if self.lm is None else self.lm.describe().get("path"),
            "ngram": None if self.ngram is None else self.ngram.path,
            "context": self.context,
        }

    def score(self, lists: Iterable[NBest]) -> Iterator[Scored]:
        """Score a stream; a few lists are in memory at a time."""
        source = self._with_context(lists)
        while batch := list(islice(source, _BATCH)):
            texts = [[h.text for h in utterance.hyps] for utterance, _ in batch]
            empty = [None] * len(batch)
            contexts = [context for _, context in batch] if self.context else None
            lm = empty if self.lm is None else self.lm.score_nbest(texts, contexts)
            ngram = empty if self.ngram is None else self.ngram.score_nbest(texts)
            for (utterance, _), a, b in zip(batch, lm, ngram):
                yield Scored(utterance, a, b)

    def _with_context(self, lists: Iterable[NBest]) -> Iterator[tuple[NBest, str]]:
        """Every list with the text before it; utterances of a conversation stand together, in order."""
        before: deque[str] = deque(maxlen=self.context)
        conversation = None
        for utterance in lists:
            name = utterance.extra.get(self.conversation) if self.context else None
            if self.context and name is None:
                raise LowbitError(
                    f"utterance {utterance.id!r} has no {self.conversation!r}, the conversation whose context is read"
                )
            if name != conversation:
                before.clear()
                conversation = name
            yield utterance, f" {EOS} ".join(before)
            before.append(utterance.hyps[0].text)


@dataclass
class RescoringReport:
    """Counts over a list; the error fields stay None where the list has no references.

    Attributes:
        duration: seconds of speech, where every utterance says its own.
    """

    utterances: int = 0
    hypotheses: int = 0
    words: int = 0
    oov: int = 0
    first_pass: str | None = None
    ref_words: int | None = None
    first_pass_errors: int | None = None
    rescored_errors: int | None = None
    oracle_errors: int | None = None
    duration: float | None = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The counts, and WERs in percent."""
        rates = {}
        if self.ref_words:
            for name in ("first_pass", "rescored", "oracle"):
                rates[f"{name}_wer"] = 100 * getattr(self, f"{name}_errors") / self.ref_words
        return {k: v for k, v in asdict(self).items() if v is not None} | rates

    def add(self, scored: Scored, after: NBest) -> None:
        before = scored.utterance
        self.utterances += 1
        self.hypotheses += len(before.hyps)
        self.words += int(scored.words.sum())
        self.oov += int(scored.oov.sum())
        seconds = before.extra.get("duration")
        known = self.duration is not None and isinstance(seconds, int | float)
        self.duration = self.duration + seconds if known else None
        if before.ref is None:
            return
        if self.ref_words is None:
            self.ref_words = self.first_pass_errors = self.rescored_errors = self.oracle_errors = 0
        errors = dict(zip((h.text for h in before.hyps), distances(before.ref, [h.text for h in before.hyps]).tolist()))
        self.ref_words += len(before.ref.split())
        self.first_pass_errors += errors[before.hyps[0].text]
        self.rescored_errors += errors[after.hyps[0].text]
        self.oracle_errors += min(errors.values())


def rescore_stream(
    scorer: Scorer,
    lists: Iterable[NBest],
    weights: Weights,
    report: RescoringReport,
    where: str = "N-best list",
    keep: int | None = None,
) -> Iterator[NBest]:
    """Yield every list reordered, and count in ``report``; a few lists are in memory at a time.

    Args:
        keep: the number of best hypotheses that stay in a list; None keeps all.

    Raises:
        LowbitError: lists with and without ``am`` scores or references in one file, or weights that were tuned on the
            other kind of list.
    """
    for scored in scorer.score(consistent(lists, report, where, weights)):
        yield reordered(scored, weights, report, keep)


def reordered(scored: Scored, weights: Weights, report: RescoringReport, keep: int | None = None) -> NBest:
    """A list by its new scores, counted in ``report``."""
    after = reorder(scored.utterance, scored.combined(weights), scored.columns(), int(scored.oov.sum()))
    report.add(scored, after)
    return after if keep is None else replace(after, hyps=after.hyps[:keep])


def consistent(
    lists: Iterable[NBest], report: RescoringReport, where: str, weights: Weights | None = None
) -> Iterator[NBest]:
    """Pass lists through; all must be of one kind, and of the kind that ``weights`` were tuned on."""
    has_ref = None
    for utterance in lists:
        kind = first_pass_kind(utterance)
        if report.first_pass is None:
            report.first_pass, has_ref = kind, utterance.ref is not None
            if weights is not None and weights.first_pass not in (kind, None):
                raise LowbitError(
                    f"{where}: the first pass gives {kind}, the weights were tuned on {weights.first_pass}; tune again"
                )
        if kind != report.first_pass:
            raise LowbitError(f"{where}: utterance {utterance.id!r}: 'am' scores in some utterances but not in all")
        if (utterance.ref is not None) is not has_ref:
            raise LowbitError(f"{where}: utterance {utterance.id!r}: 'ref' in some utterances but not in all")
        if weights is not None and weights.average_am and kind == "rank":
            raise LowbitError(f"{where}: average_am is of am scores, and the list has none")
        if weights is not None and weights.first_lm_weight and None in [h.lm for h in utterance.hyps]:
            raise LowbitError(f"{where}: utterance {utterance.id!r}: 'lm' is absent, and first_lm_weight is not 0")
        yield utterance


def score_references(scorer: Scorer, refs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """fp64 [tokens] each: log P of every word and end of sentence of the references, of both models."""
    lists = [[ref] for ref in refs]
    pairs = (scorer.lm.score_nbest(lists), scorer.ngram.score_nbest(lists))
    lm, ngram = (np.concatenate([s.token_logprobs[0] for s in scores]) for scores in pairs)
    return lm, ngram
