"""N-best lists in every form: read and written as a stream, in constant memory (but for 8 bytes an utterance)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from lowbit import nbest_json, nbest_tables
from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.nbest_record import Hypothesis, NBest
from lowbit.streams import STDIO, text_output

__all__ = ["FORMATS", "OUTPUT_FORMATS", "Hypothesis", "NBest", "find_format", "read_nbest", "write_nbest"]

Reader = Callable[[PathLike], Iterator[tuple[str, NBest]]]
READERS: dict[str, Reader] = {
    "jsonl": nbest_json.read_jsonl,
    "json": nbest_json.read_json,
    "kaldi": nbest_tables.read_kaldi,
    "espnet": nbest_tables.read_espnet,
    "tsv": nbest_tables.read_tsv,
}
FORMATS = tuple(READERS)


def find_format(path: PathLike) -> str:
    """The format that a name stands for: .jsonl, .json, .tsv (each also with .gz), .trn, a directory (Kaldi, ESPnet2).

    Standard input and other names are JSON lines.
    """
    name = str(path).removesuffix(".gz")
    if name != STDIO and Path(name).is_dir():
        return "espnet" if (Path(name) / "1best_recog").is_dir() else "kaldi"
    suffix = Path(name).suffix[1:]
    return suffix if suffix in (*FORMATS, *WRITERS) else "jsonl"


def read_nbest(path: PathLike, format: str | None = None) -> Iterator[NBest]:
    """Stream the utterances of a file or directory (:mod:`lowbit.nbest_json`, :mod:`lowbit.nbest_tables`).

    Args:
        path: "-" is standard input; ``.gz`` is decompressed.
        format: one of ``FORMATS``; by default what :func:`find_format` says.

    Raises:
        LowbitError: names file, line and utterance: not in the format, no id, an id twice, an empty list, a score that
            is not a finite number or is missing in part of a list, or a file without any list.
    """
    return checked(_pick(READERS, format or find_format(path), "read"), path)


def checked(reader: Reader, path: PathLike) -> Iterator[NBest]:
    """The lists that ``reader`` finds in ``path``; a name that occurs twice is an error, and so is no list at all."""
    seen = _Names()
    for index, (place, utterance) in enumerate(reader(path)):
        if not seen.add(utterance.id):
            first = _first_place(reader, path, utterance.id, index)
            if first:
                raise LowbitError(f"{path}: {place}: utterance {utterance.id!r} occurs twice, first on {first}")
        yield utterance
    if not len(seen):
        raise LowbitError(f"{path}: holds no N-best list; expected utterances with 'id' and 'hyps'")


def _first_place(reader: Reader, path: PathLike, name: str, before: int) -> str | None:
    """Where an utterance stands before the ``before``-th; None if nowhere, and two names only have the same hash."""
    if str(path) == STDIO:
        return "an earlier line"
    for index, (place, utterance) in enumerate(reader(path)):
        if index == before:
            return None
        if utterance.id == name:
            return place
    return None


class _Names:
    """A set of names as 8-byte hashes: two of a million names have the same one with probability 3e-8."""

    BUFFER = 1 << 16

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, name: str) -> bool:
        """False if it was there."""
        value = xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
        at = np.searchsorted(self._sorted, np.uint64(value))
        if value in self._recent or (at < len(self._sorted) and int(self._sorted[at]) == value):
            return False
        self._recent.add(value)
        if len(self._recent) == self.BUFFER:
            recent = np.fromiter(self._recent, np.uint64, self.BUFFER)
            self._recent = set()
            # In place: at a million names every copy is 8 MB.
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
        return True


def _write_best(line: Callable[[str, str], str]) -> Callable[[PathLike, Iterable[NBest]], int]:
    """A writer of transcripts: the best hypothesis of every utterance."""

    def write(path: PathLike, utterances: Iterable[NBest]) -> int:
        count = 0
        with text_output(path) as stream:
            for utterance in utterances:
                stream.write(line(utterance.id, " ".join(utterance.hyps[0].text.split())) + "\n")
                count += 1
        return count

    return write


WRITERS: dict[str, Callable[[PathLike, Iterable[NBest]], int]] = {
    "jsonl": nbest_json.write_jsonl,
    "json": nbest_json.write_json,
    "kaldi": nbest_tables.write_kaldi,
    "tsv": nbest_tables.write_tsv,
    "text": _write_best(lambda name, words: f"{name} {words}".rstrip()),
    "trn": _write_best(lambda name, words: f"{words} ({name})".lstrip()),
}
OUTPUT_FORMATS = tuple(WRITERS)


def write_nbest(path: PathLike, utterances: Iterable[NBest], format: str | None = None) -> int:
    """Stream utterances to a file or directory that appears only when complete.

    Args:
        path: "-" is standard output; gzip where it ends in ``.gz``.
        format: one of ``OUTPUT_FORMATS``; "text" (Kaldi's: id, words) and "trn" (sclite's) hold the best hypotheses
            only.

    Returns:
        how many were written.
    """
    return _pick(WRITERS, format or find_format(path), "write")(path, utterances)


def _pick(table: dict[str, Callable], format: str, verb: str) -> Callable:
    if format not in table:
        raise LowbitError(f"cannot {verb} the format {format!r}; one of {', '.join(table)}")
    return table[format]
