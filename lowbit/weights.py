"""The weights of a rescored hypothesis, and their file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json, write_json

VERSION = 2
INTERPOLATIONS = ("log", "linear")


@dataclass(frozen=True)
class Weights:
    """score = acoustic_weight · am + first_lm_weight · lm + lm_weight · L + length_bonus · words
    + unknown_weight · unknown words (DESIGN section 8).

    L is log P of the hypothesis under the language model, or under the model and an n-gram: interpolated in the
    logarithms, w · log P + (1 − w) · log P_n-gram, or linearly, the sum over words of log(w · P + (1 − w) · P_n-gram).

    Attributes:
        unknown_weight: score of every word outside the vocabulary of the language model (of the n-gram where that is
            alone). log P has them as <unk>, which is as probable as all unknown words together: without a weight of
            its own it rewards them.
        interpolation_weight: w; 1 without an n-gram, 0 with an n-gram alone.
        interpolation: "log" or "linear".
        acoustic_weight: of the first pass's am score (or minus the rank), to which the other weights are relative.
        average_am: the list's am is an average over the words and the end of a hypothesis; it is multiplied by their
            number.
        first_lm_weight: of the log P under the first pass's language model that the list holds.
        first_pass: what the weights were tuned against: "am" scores, or "rank" where a list had none. None where they
            were given by hand.
        tuned_on: list, models, utterances, and the WER before and after, of the tuning.
    """

    lm_weight: float
    length_bonus: float = 0.0
    interpolation_weight: float = 1.0
    interpolation: str = "log"
    acoustic_weight: float = 1.0
    first_lm_weight: float = 0.0
    unknown_weight: float = 0.0
    average_am: bool = False
    first_pass: str | None = None
    tuned_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            if not math.isfinite(getattr(self, name)):
                raise LowbitError(f"rescore: the weight {name} must be finite, not {getattr(self, name)}")
        if not 0 <= self.interpolation_weight <= 1:
            raise LowbitError(f"rescore: interpolation_weight must lie in [0, 1], not {self.interpolation_weight}")
        if self.interpolation not in INTERPOLATIONS:
            raise LowbitError(f"rescore: interpolation must be log or linear, not {self.interpolation!r}")
        if not isinstance(self.average_am, bool):
            raise LowbitError(f"rescore: average_am must be true or false, not {self.average_am!r}")

    def save(self, path: PathLike) -> None:
        write_json(path, {"version": VERSION} | asdict(self))

    @classmethod
    def load(cls, path: PathLike) -> Weights:
        """Raises LowbitError: not a weights file, or numbers that are not finite. Version 1 knew two weights only."""
        values = read_json(path)
        if not isinstance(values, dict) or values.get("version") not in (1, VERSION):
            raise LowbitError(f"{path}: not a weights file of version {VERSION}; make one with --tune")
        for name in NUMBERS:
            value = values.get(name, None if name in ("lm_weight", "length_bonus") else 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise LowbitError(f"{path}: {name!r} must be a finite number, not {value!r}")
        first_pass, tuned_on = values.get("first_pass"), values.get("tuned_on", {})
        if first_pass not in ("am", "rank", None) or not isinstance(tuned_on, dict):
            raise LowbitError(f"{path}: 'first_pass' must be \"am\", \"rank\" or null, and 'tuned_on' an object")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{k: float(v) if k in NUMBERS else v for k, v in values.items() if k in known})
        except LowbitError as error:
            raise LowbitError(f"{path}: {error}") from None


NUMBERS = ("lm_weight", "length_bonus", "interpolation_weight", "acoustic_weight", "first_lm_weight", "unknown_weight")
