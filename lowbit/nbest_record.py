"""An N-best list: the hypotheses of one utterance, best first, whatever file they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis.

    Attributes:
        am: the recogniser's score, a log-probability up to scale; larger is better.
        lm: log-probability under the first pass's language model.
        extra: every other field.
    """

    text: str
    am: float | None = None
    lm: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        scores = {k: v for k, v in (("am", self.am), ("lm", self.lm)) if v is not None}
        return {"text": self.text} | scores | self.extra


@dataclass(frozen=True)
class NBest:
    """The hypotheses of one utterance, best first, all with ``am`` or all without.

    Attributes:
        ref: the reference.
        extra: every other field, such as the speaker; kept and written back.
    """

    id: str
    hyps: list[Hypothesis]
    ref: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_am(self) -> bool:
        return self.hyps[0].am is not None

    def to_dict(self) -> dict[str, Any]:
        ref = {} if self.ref is None else {"ref": self.ref}
        return {"id": self.id} | self.extra | ref | {"hyps": [h.to_dict() for h in self.hyps]}

    @classmethod
    def from_dict(cls, record: Any, where: str = "N-best list") -> NBest:
        """Validating inverse of :meth:`to_dict`; ``where`` (file and line) heads every error."""
        if not isinstance(record, dict):
            raise LowbitError(f"{where}: expected an object with 'id' and 'hyps', found {type(record).__name__}")
        name = record.get("id")
        if not isinstance(name, str) or not name:
            raise LowbitError(f"{where}: the utterance has no 'id' (a string that is not empty)")
        where = f"{where}: utterance {name!r}"
        ref, hyps = record.get("ref"), record.get("hyps")
        if ref is not None and not isinstance(ref, str):
            raise LowbitError(f"{where}: 'ref' must be a string, not {type(ref).__name__}")
        if not isinstance(hyps, list) or not hyps:
            raise LowbitError(f"{where}: 'hyps' must be a list with at least one hypothesis")
        parsed = [_hypothesis(h, f"{where}: hypothesis {i}") for i, h in enumerate(hyps, 1)]
        without = [i for i, h in enumerate(parsed, 1) if h.am is None]
        if without and len(without) < len(parsed):
            raise LowbitError(f"{where}: hypothesis {without[0]} has no 'am' but others have; give it to all or none")
        extra = {k: v for k, v in record.items() if k not in ("id", "ref", "hyps")}
        return cls(name, parsed, ref, extra)


def _hypothesis(record: Any, where: str) -> Hypothesis:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise LowbitError(f"{where}: expected an object with 'text' (a string)")
    scores = {name: finite(record.get(name), f"{where}: {name!r}") for name in ("am", "lm")}
    extra = {k: v for k, v in record.items() if k not in ("text", "am", "lm")}
    return Hypothesis(record["text"], **scores, extra=extra)


def finite(value: Any, where: str) -> float | None:
    """A score as a float; None stays None, and what is no finite number is an error that begins with ``where``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LowbitError(f"{where} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise LowbitError(f"{where} must be a finite number")
    return number
