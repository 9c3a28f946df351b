"""N-best lists as JSON lines: ``{"id", "ref"?, "hyps": [{"text", "am"?, "lm"?}]}``, best first (DESIGN section 8).

Fields that lowbit does not know (a speaker, a duration) are kept and written back.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike, atomic_path, not_utf8, open_text


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
    """The hypotheses of one utterance, best first, all with ``am`` or all without."""

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
    scores = {name: _finite(record.get(name), f"{where}: {name!r}") for name in ("am", "lm")}
    extra = {k: v for k, v in record.items() if k not in ("text", "am", "lm")}
    return Hypothesis(record["text"], **scores, extra=extra)


def _finite(value: Any, where: str) -> float | None:
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


def read_nbest(path: PathLike) -> Iterator[NBest]:
    """Stream the utterances of a JSON-lines file (``.gz`` where its name says so); blank lines are skipped.

    Raises:
        LowbitError: names file, line and utterance: not JSON, no id, an id twice, an empty list, a score that is not a
            finite number or is missing in part of a list, or a file without any list.
    """
    seen: dict[str, int] = {}
    with open_text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                utterance = NBest.from_dict(_parse(line, where), where)
                if (first := seen.setdefault(utterance.id, number)) != number:
                    raise LowbitError(f"{where}: utterance {utterance.id!r} occurs twice, first on line {first}")
                yield utterance
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except (OSError, EOFError) as error:
            raise LowbitError(f"{path}: cannot read: {error}") from None
    if not seen:
        raise LowbitError(f"{path}: holds no N-best list; expected JSON lines with 'id' and 'hyps'")


def _parse(line: str, where: str) -> Any:
    def reject(name: str) -> None:
        raise LowbitError(f"{where}: {name} is not a finite number")

    try:
        return json.loads(line, parse_constant=reject)
    except LowbitError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).removesuffix(": line 1 column 1 (char 0)")
        raise LowbitError(f"{where}: not JSON: {reason}") from None


def write_nbest(path: PathLike, utterances: Iterable[NBest]) -> int:
    """Stream utterances to a file that appears only when complete; gzip where its name ends in ``.gz``.

    Returns:
        how many were written.
    """
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as raw:
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if str(path).endswith(".gz") else raw
        with io.TextIOWrapper(packed, encoding="utf-8") as stream:
            for utterance in utterances:
                try:
                    stream.write(json.dumps(utterance.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
                except ValueError as error:
                    raise LowbitError(f"{path}: utterance {utterance.id!r}: {error}") from None
                count += 1
    return count
