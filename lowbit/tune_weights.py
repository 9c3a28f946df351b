"""Weights for a development list: exact line searches on its word errors, all of it or fold by fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.errors import LowbitError, check_seed
from lowbit.nbest_record import NBest
from lowbit.rescore import RescoringReport, Scored, Scorer, consistent, mixture, reordered, score_references
from lowbit.tune import ErrorSurface, tune
from lowbit.weights import Weights
from lowbit.wer import distances

DEFAULT = Weights(0.0)
SIGNED = ("length_bonus", "unknown_weight")  # the other weights are never negative
HOLDABLE = (*SIGNED, "first_lm_weight")


def score_development(
    scorer: Scorer,
    lists: Iterable[NBest],
    where: str = "N-best list",
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Scored], str]:
    """All lists of a development set scored, and the kind of their first pass.

    Raises:
        LowbitError: a list without references, or a mixture of kinds.
    """
    report, found = RescoringReport(), []
    for scored in scorer.score(_with_references(consistent(lists, report, where), where)):
        found.append(scored)
        progress()
    if not any(s.utterance.ref.split() for s in found):
        raise LowbitError(f"{where}: the references hold no word")
    return found, report.first_pass


def _with_references(lists: Iterable[NBest], where: str) -> Iterable[NBest]:
    for utterance in lists:
        if utterance.ref is None:
            raise LowbitError(f"{where}: utterance {utterance.id!r} has no 'ref'; tuning needs references")
        yield utterance


def tune_weights(
    scorer: Scorer,
    development: Sequence[Scored],
    first_pass: str,
    where: str = "N-best list",
    fixed: Weights = DEFAULT,
    seed: int = 0,
    hold: Sequence[str] = (),
) -> Weights:
    """The weights with the fewest word errors that the search finds (:mod:`lowbit.tune`), relative to the acoustic one.

    Weights of language models are never negative. A linear interpolation's weight is not on any line of the search: it
    is the one that makes the references most probable.

    Args:
        development, first_pass: of :func:`score_development`.
        where: the list's name, for the weights file.
        fixed: what is not tuned: interpolation and average_am.
        hold: weights of ``HOLDABLE`` that stay 0.
    """
    if fixed.average_am and first_pass == "rank":
        raise LowbitError(f"{where}: average_am is of am scores, and the list has none")
    fixed = _with_mixture(scorer, development, fixed)
    columns = {name: c for name, c in _columns(scorer, development, fixed).items() if name not in hold}
    surface = ErrorSurface(
        [s.first_pass(fixed) for s in development],
        [np.stack([c(s) for c in columns.values()]) for s in development],
        [distances(s.utterance.ref, [h.text for h in s.utterance.hyps]) for s in development],
    )
    found = tune(surface, [-math.inf if name in SIGNED else 0.0 for name in columns], seed=seed)
    best = dict(zip(columns, found.tolist()))
    lm_weight = best.pop("lm") + best.get("ngram", 0.0)
    if "ngram" in best:
        fixed = replace(fixed, interpolation_weight=1 - best.pop("ngram") / lm_weight if lm_weight else 1.0)
    ref_words = sum(len(s.utterance.ref.split()) for s in development)
    tuned_on = {"list": where, **scorer.describe(), "utterances": len(development), "seed": seed}
    # The list's own order is the first pass: the am scores alone may have another.
    for name, errors in (("first_pass", surface.errors[:, 0].sum()), ("rescored", surface.count(found))):
        tuned_on[f"{name}_wer"] = float(100 * errors / ref_words)
    return replace(fixed, lm_weight=lm_weight, first_pass=first_pass, tuned_on=tuned_on, **best)


def _with_mixture(scorer: Scorer, development: Sequence[Scored], fixed: Weights) -> Weights:
    """The interpolation weight where it is not searched: of a linear interpolation, and of one model alone."""
    if scorer.lm is None or scorer.ngram is None:
        return replace(fixed, interpolation_weight=0.0 if scorer.lm is None else 1.0, interpolation="log")
    if fixed.interpolation == "log":
        return fixed
    share = best_mixture(*score_references(scorer, [s.utterance.ref for s in development]))
    return replace(fixed, interpolation_weight=share)


def _columns(
    scorer: Scorer, development: Sequence[Scored], fixed: Weights
) -> dict[str, Callable[[Scored], np.ndarray]]:
    """What is weighed, each as a function from a list to fp64 [H]; "lm" and "ngram" make up the language score."""
    columns: dict[str, Callable[[Scored], np.ndarray]] = {"lm": lambda s: s.language_score(fixed)}
    if scorer.lm is not None and scorer.ngram is not None and fixed.interpolation == "log":
        columns = {"lm": lambda s: s.lm.logprobs, "ngram": lambda s: s.ngram.logprobs}
    columns |= {"length_bonus": lambda s: s.words.astype(np.float64)}
    columns |= {"unknown_weight": lambda s: s.oov.astype(np.float64)}
    if all(s.first_lm is not None for s in development):
        columns |= {"first_lm_weight": lambda s: s.first_lm}
    return columns


def best_mixture(a: np.ndarray, b: np.ndarray, rounds: int = 200, tolerance: float = 1e-9) -> float:
    """w that maximises Σ log(w · e^a + (1 − w) · e^b), by EM: the likelihood is concave in w.

    Args:
        a, b: fp64 [tokens], log P of a text under two models.
    """
    w = 0.5
    for _ in range(rounds):
        # Never 0 or 1, from where EM could not come back.
        new = float(np.clip(np.exp(a + math.log(w) - mixture(a, b, w)).mean(), 1e-6, 1 - 1e-6))
        if abs(new - w) < tolerance:
            break
        w = new
    return w


def fold_of(lists: Sequence[NBest], folds: int, field: str, where: str, seed: int = 0) -> np.ndarray:
    """int64 [U]: the fold of every list; lists with the same value of ``field`` (a speaker) share one.

    Values are shuffled, then each goes to the fold that has the fewest reference words so far, largest first.

    Raises:
        LowbitError: a list without the field, or fewer values than folds.
    """
    check_seed(seed)
    sizes: dict[Any, int] = {}
    for utterance in lists:
        value = utterance.extra.get(field)
        if not isinstance(value, str | int):
            raise LowbitError(f"{where}: utterance {utterance.id!r} has no {field!r}, by which the folds are made")
        sizes[value] = sizes.get(value, 0) + len(utterance.ref.split())
    if not 2 <= folds <= len(sizes):
        raise LowbitError(f"{where}: --folds must lie between 2 and the {len(sizes)} values of {field!r}, not {folds}")
    names = list(sizes)
    np.random.default_rng(seed).shuffle(names)
    filled, home = np.zeros(folds), {}
    for name in sorted(names, key=lambda n: -sizes[n]):
        home[name] = int(filled.argmin())
        filled[home[name]] += sizes[name]
    return np.array([home[u.extra[field]] for u in lists])


def cross_validate(
    scorer: Scorer,
    development: Sequence[Scored],
    first_pass: str,
    fold: np.ndarray,
    where: str = "N-best list",
    fixed: Weights = DEFAULT,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    hold: Sequence[str] = (),
) -> tuple[list[NBest], RescoringReport, list[Weights]]:
    """Every fold rescored by the weights tuned on all the others.

    Returns:
        the lists in their order, their report, and the weights of every fold.
    """
    weights = []
    for k in range(fold.max() + 1):
        others = [s for s, f in zip(development, fold) if f != k]
        weights.append(tune_weights(scorer, others, first_pass, where, fixed, seed, hold))
        progress()
    report = RescoringReport(first_pass=first_pass)
    return [reordered(s, weights[f], report) for s, f in zip(development, fold)], report, weights
