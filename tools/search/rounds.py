"""Sampling in rounds until the estimates are good enough: spread over processes, resumable, the same for any number.

Sample i is a function of i alone and all samples are kept in their order, so neither the number of processes nor an
interruption changes a result beyond the rounding of the machine that computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lowbit.tools import cli
from lowbit.tools.training.loop import Resume
from lowbit.tools.training.parallel import Parallel

Sample = Callable[[int], np.ndarray]


def collect(
    sample: Sample,
    enough: Callable[[np.ndarray], str | None],
    most: int,
    out: str,
    identity: dict[str, Any],
    parallel: Parallel,
    round_size: int = 8,
    restart: bool = False,
    label: str = "samples",
) -> tuple[np.ndarray, str]:
    """Call ``sample`` for 0, 1, 2 ... until ``enough`` gives a reason to stop, at most ``most`` times.

    Args:
        sample: index -> an array, always of the same shape.
        enough: called after every round with all samples [S, ...].
        out: ``out``.resume holds the samples so far until the caller's result is written.

    Returns:
        samples fp64 [S, ...], and the reason.
    """
    resume = Resume(out, identity, parallel, restart)
    state = resume.load()
    samples = [] if state is None else list(state["samples"].numpy())
    reason = None if state is None else state["reason"]
    with resume.guarded(), cli.Progress(label, most, "sample", len(samples)) as bar:
        while reason is None:
            new = _round(sample, range(len(samples), min(most, len(samples) + round_size)), parallel)
            samples += new
            reason = enough(np.stack(samples)) or ("limit" if len(samples) >= most else None)
            bar.advance(len(new))
            if resume.due() or reason:
                resume.save({"samples": torch.from_numpy(np.stack(samples)), "reason": reason})
    return np.stack(samples), reason


def finish(out: str, identity: dict[str, Any], parallel: Parallel) -> None:
    """Drop the state that :func:`collect` kept, once the result is safely written."""
    Resume(out, identity, parallel).finish()


def _round(sample: Sample, indices: range, parallel: Parallel) -> list[np.ndarray]:
    """Samples of ``indices``, each computed by one process and known to all."""
    mine = {i: sample(i) for i in indices if i % parallel.world == parallel.rank}
    everyone = {i: value for part in parallel.gather(mine) for i, value in part.items()}
    return [np.asarray(everyone[i], dtype=np.float64) for i in indices]


def standard_error(samples: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; infinite for a single sample."""
    if len(samples) < 2:
        return np.full(samples.shape[1:], np.inf)
    return samples.std(axis=0, ddof=1) / len(samples) ** 0.5
