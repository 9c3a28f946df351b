"""The two exceptions that lowbit raises for bad input. Their message is one line that says what to do."""

from __future__ import annotations


class LowbitError(ValueError):
    """Bad input: a file, a plan, a text or an argument. The command line prints it and exits with 2."""


class FormatError(LowbitError):
    """A model file that is damaged, edited or not ours; the message names the tensor and the reason."""
