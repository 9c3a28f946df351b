"""The two exceptions that lowbit raises for bad input, one line that says what to do, and a check that all share."""

from __future__ import annotations

import numbers


class LowbitError(ValueError):
    """Bad input: a file, a plan, a text or an argument. The command line prints it and exits with 2."""


class FormatError(LowbitError):
    """A model file that is damaged, edited or not ours; the message names the tensor and the reason."""


def check_seed(seed: int | None) -> None:
    """Raises LowbitError unless ``seed`` is None or an integer from 0, as NumPy's generators want it."""
    if seed is not None and (not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or seed < 0):
        raise LowbitError(f"seed must be an integer from 0, not {seed!r}")
