"""References and hypotheses for scoring, utterance by utterance, from transcripts and N-best lists alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.nbest import FORMATS, find_format, read_nbest
from lowbit.streams import numbered_lines

_TRN = re.compile(r"^(.*?)\s*\(([^()\s]+)\)\s*$")
TRANSCRIPTS = ("lines", "text", "trn")


@dataclass(frozen=True)
class Row:
    """One utterance of a file.

    Attributes:
        id: None in a file of lines without names.
        text: the reference, or the best hypothesis.
        hyps: all hypotheses, of an N-best list.
    """

    id: str | None
    text: str
    hyps: list[str] | None = None


def read_rows(path: PathLike, references: bool, format: str | None = None) -> Iterator[Row]:
    """Stream the utterances of a file.

    Args:
        references: of an N-best list take the reference, not the best hypothesis.
        format: "lines" (one text a line), "text" (Kaldi's: a name, then the words), "trn" (sclite's: the words, then a
            name in parentheses), or that of an N-best list; by default what the name says, and lines else.

    Raises:
        LowbitError: names file, line and utterance; also for a file without any.
    """
    format = format or _by_name(path)
    if format in FORMATS:
        return _of_lists(path, references, format)
    if format not in TRANSCRIPTS:
        raise LowbitError(f"cannot read the format {format!r}; one of {', '.join((*TRANSCRIPTS, *FORMATS))}")
    return _of_transcripts(path, format)


def _by_name(path: PathLike) -> str:
    found = find_format(path)
    listed = found != "jsonl" or str(path).removesuffix(".gz").endswith(".jsonl")
    return found if listed else "lines"


def _of_lists(path: PathLike, references: bool, format: str) -> Iterator[Row]:
    for utterance in read_nbest(path, format):
        if references and utterance.ref is None:
            raise LowbitError(f"{path}: utterance {utterance.id!r} has no 'ref'")
        hyps = [h.text for h in utterance.hyps]
        yield Row(utterance.id, utterance.ref if references else hyps[0], hyps)


def _of_transcripts(path: PathLike, format: str) -> Iterator[Row]:
    number = 0
    for number, line in numbered_lines(path):
        if format == "lines":
            yield Row(None, line)
        elif format == "text":
            name, *text = line.split(maxsplit=1) or [None]
            if name is None:
                raise LowbitError(f"{path}: line {number} is empty; expected a name and words")
            yield Row(name, text[0] if text else "")
        elif match := _TRN.match(line):
            yield Row(match[2], match[1])
        elif line.strip():
            raise LowbitError(f"{path}: line {number}: expected words and then a name in parentheses")
    if not number:
        raise LowbitError(f"{path}: the file is empty")


class Matched:
    """The rows of a file in the order of another: by name where both have names, else by line.

    In the same order nothing is held in memory; a row that comes too early is held until it is wanted.
    """

    def __init__(self, path: PathLike, reference: PathLike, format: str | None = None):
        self.path, self.reference = path, reference
        self._rows = partial(next, read_rows(path, False, format), None)
        self._waiting: dict[str, Row] = {}
        self._by_line, self._count = False, 0

    def get(self, name: str | None) -> Row:
        """The row of an utterance; the next one where either file has no names."""
        if name in self._waiting:
            return self._waiting.pop(name)
        while (row := self._rows()) is not None:
            self._by_line = name is None or row.id is None
            self._count += 1
            if self._by_line or row.id == name:
                return row
            if row.id in self._waiting:
                raise LowbitError(f"{self.path}: utterance {row.id!r} occurs twice")
            self._waiting[row.id] = row
        if self._by_line or not self._count:
            raise LowbitError(f"{self.path}: {self._count} utterances, but {self.reference} has more")
        raise LowbitError(f"{self.path}: no utterance {name!r}, which {self.reference} has")

    def end(self) -> None:
        """Raises LowbitError if an utterance was not asked for."""
        row = next(iter(self._waiting.values()), None) or self._rows()
        if row is not None and self._by_line:
            raise LowbitError(f"{self.path}: more utterances than the {self._count} of {self.reference}")
        if row is not None:
            raise LowbitError(f"{self.path}: utterance {row.id!r} is not in {self.reference}")
