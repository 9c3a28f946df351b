"""What the demo proves about its packed model: the file holds what training ended with, and the engine computes it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import lowbit
from lowbit.checkpoint import Checkpoint
from lowbit.container import PackedFile
from lowbit.errors import LowbitError

LOGPROB_TOLERANCE = 1e-3  # nats a sentence: fp32 sums in another order, over some ten tokens


def same_codes(trained: str, packed: str) -> dict[str, int]:
    """Compare every matrix and vector of a packed file with its ADMM checkpoint, bit for bit.

    Returns:
        how many matrices, weights and vector entries are identical.

    Raises:
        LowbitError: the first tensor that differs.
    """
    checkpoint = Checkpoint.load(trained)
    count = {"matrices": 0, "weights": 0, "vector_entries": 0}
    with PackedFile(packed) as file:
        for name, matrix in file.matrices():
            weight = checkpoint.tensors[f"{name}.weight"]
            _require_equal(f"{name}.scale", matrix.scale, checkpoint.scales[name])
            _require_equal(name, matrix.to_quant_tensor().dequantize(), weight)
            count["matrices"] += 1
            count["weights"] += weight.numel()
        for name in file.header.config.vector_shapes():
            _require_equal(name, file.vector(name).float(), checkpoint.tensors[name])
            count["vector_entries"] += checkpoint.tensors[name].numel()
    if count["matrices"] != len(checkpoint.plan or ()):
        raise LowbitError(f"{packed}: {count['matrices']} matrices packed, the plan has {len(checkpoint.plan or ())}")
    return count


def _require_equal(name: str, packed: torch.Tensor, trained: torch.Tensor) -> None:
    if packed.shape != trained.shape or not torch.equal(packed, trained):
        different = int((packed != trained).sum()) if packed.shape == trained.shape else trained.numel()
        raise LowbitError(f"packed is not trained: {different:,} of {trained.numel():,} values of {name!r} differ")


def same_scores(trained: str, packed: str, sentences: Sequence[str]) -> float:
    """Largest difference of log P, nats a sentence, between the torch model and the kernels on fp32 activations.

    Raises:
        LowbitError: above LOGPROB_TOLERANCE.
    """
    ours = lowbit.load(packed, compute="exact").score(sentences)
    reference = lowbit.load(trained).score(sentences)
    worst, sentence = max((abs(a.logprob - b.logprob), s) for a, b, s in zip(ours, reference, sentences, strict=True))
    if not worst <= LOGPROB_TOLERANCE:
        raise LowbitError(f"packed is not trained: log P differs by {worst:.2g} for the sentence {sentence!r}")
    return worst


def sentences_per_second(models: Sequence[str], sentences: Sequence[str], rounds: int = 3) -> list[float]:
    """Scoring speed of every model on ``sentences``: the best of ``rounds``, models taking turns."""
    engines = [lowbit.load(model) for model in models]
    for lm in engines:
        lm.score(sentences[:32])
    seconds = [[] for _ in engines]
    for _ in range(rounds):
        for times, lm in zip(seconds, engines, strict=True):
            start = time.perf_counter()
            lm.score(sentences)
            times.append(time.perf_counter() - start)
    return [len(sentences) / min(times) for times in seconds]


def describe(model: str) -> dict[str, Any]:
    """What runs a model: kernel, instruction set, precision."""
    return lowbit.load(model).describe()
