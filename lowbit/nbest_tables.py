"""N-best lists as tables: a Kaldi n-best directory, ESPnet2's output directory, or tab-separated values.

A Kaldi directory holds one line a hypothesis, named UTTERANCE-N, N from 1, in each of ``words_text`` (or ``words``),
``ac_cost`` (``acwt`` in the archives of Kaldi's own rescoring scripts) and ``lm_cost`` (``lmwt.withlm`` there: graph
and language model); both may be absent. Costs are negated log-probabilities. Beside them may stand, one line an
utterance and in the same order, ``text`` (references), ``utt2dur`` and ``utt2spk``. Each may be gzipped (``.gz``). N is
kept as the hypothesis' field "n".

An ESPnet2 directory holds ``1best_recog``, ``2best_recog`` ..., each with ``text`` and, where there are scores,
``score``, one line an utterance in the same order everywhere; an utterance with fewer hypotheses is left out.

A TSV file starts with its columns' names: ``id`` and ``text``, and where there are such ``am``, ``lm``, ``ref`` and
others; the hypotheses of an utterance stand together, best first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.nbest_record import NBest
from lowbit.streams import numbered_lines, text_output

Place = tuple[str, NBest]
SCORES = {"ac_cost": "am", "lm_cost": "lm"}
# What a file may be called; the first one there is read.
NAMES = {"hyps": ("words_text", "words"), "am": ("ac_cost", "acwt"), "lm": ("lm_cost", "lmwt.withlm")}
SIDE_TABLES = {"ref": ("text",), "duration": ("utt2dur",), "spk": ("utt2spk",)}
# Columns that belong to the utterance; all but id and ref are kept in its extra fields.
UTTERANCE_COLUMNS = ("id", "ref", "spk", "conv", "duration")


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LowbitError(f"{where}: {text!r} is not a number") from None


def _keyed(path: PathLike) -> Iterator[tuple[int, str, str]]:
    """Line number, first word and rest of every line of a Kaldi table."""
    for number, line in numbered_lines(path):
        key, *rest = line.split(maxsplit=1) or [None]
        if key is None:
            raise LowbitError(f"{path}: line {number} is empty; expected a name and a value")
        yield number, key, rest[0].strip() if rest else ""


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


class SideTable:
    """One line an utterance, in the order of the lists; utterances without a list are passed over."""

    def __init__(self, path: PathLike):
        self.path, self.rows = path, _keyed(path)

    def get(self, utterance: str) -> str:
        for _, key, value in self.rows:
            if key == utterance:
                return value
        raise LowbitError(
            f"{self.path}: utterance {utterance!r} is absent, or not in the order of the lists; sort all files alike"
        )


def with_references(lists: Iterable[NBest], path: PathLike) -> Iterator[NBest]:
    """Lists with the references of a table, one line an utterance: its name and its words; in the lists' order."""
    table = SideTable(path)
    for utterance in lists:
        yield replace(utterance, ref=table.get(utterance.id))


def read_symbols(path: PathLike) -> dict[str, str]:
    """Number -> word of a Kaldi symbol table."""
    table: dict[str, str] = {}
    for number, line in numbered_lines(path):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdecimal():
            raise LowbitError(f"{path}: line {number}: expected a word and its number")
        table[parts[1]] = parts[0]
    return table


def with_symbols(lists: Iterable[NBest], path: PathLike) -> Iterator[NBest]:
    """Lists whose words are numbers, as Kaldi's programs write them, with the words of a symbol table.

    Raises:
        LowbitError: a number that the table lacks.
    """
    table = read_symbols(path)
    for utterance in lists:
        hyps = []
        for hyp in utterance.hyps:
            words = hyp.text.split()
            if unknown := [w for w in words if w not in table]:
                raise LowbitError(f"{path}: no number {unknown[0]!r}, which utterance {utterance.id!r} holds")
            hyps.append(replace(hyp, text=" ".join(table[w] for w in words)))
        yield replace(utterance, hyps=hyps)


def read_kaldi(path: PathLike) -> Iterator[Place]:
    """A Kaldi n-best directory; its files are read side by side."""
    folder = Path(path)
    words = _first_file(folder, NAMES["hyps"])
    if words is None:
        raise LowbitError(f"{path}: no Kaldi n-best directory: it has no file 'words' or 'words_text'")
    scores = {field: table for field in SCORES.values() if (table := _first_file(folder, NAMES[field]))}
    sides = {field: SideTable(table) for field, n in SIDE_TABLES.items() if (table := _first_file(folder, n))}
    for utterance, rows in groupby(_kaldi_hypotheses(words, scores), key=lambda row: row[1]):
        rows = list(rows)
        first = f"{words}: line {rows[0][0]}"
        values: dict[str, Any] = {field: table.get(utterance) for field, table in sides.items()}
        if "duration" in values:
            values["duration"] = _number(values["duration"], f"{sides['duration'].path}: utterance {utterance!r}")
        ranked = sorted(rows, key=lambda row: row[2])
        if len({row[2] for row in rows}) < len(rows):
            raise LowbitError(f"{first}: utterance {utterance!r}: a hypothesis occurs twice")
        record = {"id": utterance, "hyps": [row[3] for row in ranked]} | values
        yield f"line {rows[0][0]}", NBest.from_dict(record, first)


def _kaldi_hypotheses(words: Path, scores: dict[str, Path]) -> Iterator[tuple[int, str, int, dict]]:
    """Line number, utterance, N and hypothesis of every line of ``words``, with its scores."""
    tables = {field: _keyed(path) for field, path in scores.items()}
    for number, key, text in _keyed(words):
        utterance, _, rank = key.rpartition("-")
        if not utterance or not rank.isdecimal():
            raise LowbitError(f"{words}: line {number}: {key!r} is not the name of a hypothesis, UTTERANCE-N")
        hypothesis: dict[str, Any] = {"text": text, "n": int(rank)}
        for field, rows in tables.items():
            other, found, value = next(rows, (number, None, ""))
            where = f"{scores[field]}: line {other}"
            if found != key:
                raise LowbitError(f"{where}: {found or 'the end'}, where {words} has {key}; sort both alike")
            hypothesis[field] = -_number(value, where)
        yield number, utterance, int(rank), hypothesis
    for field, rows in tables.items():
        if extra := next(rows, None):
            raise LowbitError(f"{scores[field]}: line {extra[0]}: {extra[1]} is not in {words}")


class _Rank:
    """The hypotheses of one rank of an ESPnet2 directory, in the order of the best ones."""

    def __init__(self, folder: Path):
        self.path = folder / "text"
        self._texts, self._next = _keyed(self.path), None
        score = _first_file(folder, ("score",))
        self._scores = None if score is None else SideTable(score)

    def get(self, utterance: str | None) -> tuple[int, str, dict[str, Any]] | None:
        """Line, utterance and hypothesis, if the next one is of this utterance; of any where that is None."""
        row = self._next or next(self._texts, None)
        self._next = row
        if row is None or utterance not in (None, row[1]):
            return None
        self._next = None
        number, name, text = row
        if self._scores is None:
            return number, name, {"text": text}
        # ESPnet2 prints a score as PyTorch does: tensor(-1.5, device='cuda:0').
        score = self._scores.get(name).removeprefix("tensor(").partition(",")[0].rstrip(")")
        return number, name, {"text": text, "am": _number(score, f"{self._scores.path}: utterance {name!r}")}


def read_espnet(path: PathLike) -> Iterator[Place]:
    """An output directory of ESPnet2's inference; its files are read side by side."""
    folders = (Path(path) / f"{n}best_recog" for n in itertools.count(1))
    ranks = [_Rank(folder) for folder in itertools.takewhile(Path.is_dir, folders)]
    if not ranks:
        raise LowbitError(f"{path}: no output directory of ESPnet2: it has no folder '1best_recog'")
    while row := ranks[0].get(None):
        number, name, best = row
        rest = [found[2] for rank in ranks[1:] if (found := rank.get(name))]
        where = f"{ranks[0].path}: line {number}"
        yield f"line {number}", NBest.from_dict({"id": name, "hyps": [best, *rest]}, where)
    for rank in ranks[1:]:
        if row := rank.get(None):
            raise LowbitError(
                f"{rank.path}: line {row[0]}: utterance {row[1]!r} is not in {ranks[0].path}, or not in its order"
            )


def write_kaldi(path: PathLike, utterances: Iterable[NBest]) -> int:
    """A new directory, which appears when complete: words, costs of the scores that the hypotheses have, and text.

    Hypotheses are numbered anew, best first. Every field of theirs that is a number becomes a table of its own name, so
    "n" tells the number that a hypothesis had in the directory that was read; am and lm become ac_cost and lm_cost.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.exists():
        raise LowbitError(f"{target}: exists already; a Kaldi directory is written anew only")
    count = 0
    try:
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            files: dict[str, IO[str]] = {}
            for utterance in utterances:
                _write_kaldi_list(stack, files, temporary, utterance, count == 0)
                count += 1
        os.rename(temporary, target)
    except OSError as error:
        raise LowbitError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def _write_kaldi_list(
    stack: contextlib.ExitStack, files: dict[str, IO[str]], folder: Path, utterance: NBest, first: bool
) -> None:
    lines: dict[str, list[str]] = {"words": []}
    if utterance.ref is not None:
        lines["text"] = [f"{utterance.id} {utterance.ref}"]
    for rank, hyp in enumerate(utterance.hyps, 1):
        name = f"{utterance.id}-{rank}"
        lines["words"].append(f"{name} {hyp.text}".rstrip())
        costs = {n: -s for n, field in SCORES.items() if (s := getattr(hyp, field)) is not None}
        numbers = {k: v for k, v in hyp.extra.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for key, value in (costs | numbers).items():
            lines.setdefault(key, []).append(f"{name} {value:.10g}")
    if first:
        files |= {name: stack.enter_context(text_output(folder / name)) for name in lines}
    if set(lines) != set(files) or any(len(v) != len(utterance.hyps) for k, v in lines.items() if k != "text"):
        raise LowbitError(f"utterance {utterance.id!r} has other scores than the ones before it")
    for key, rows in lines.items():
        files[key].write("\n".join(rows) + "\n")


def read_tsv(path: PathLike) -> Iterator[Place]:
    """Tab-separated values with a header."""
    lines = numbered_lines(path)
    number, header = next(lines, (1, ""))
    columns = header.split("\t")
    if "id" not in columns or "text" not in columns or len(set(columns)) < len(columns):
        raise LowbitError(f"{path}: line 1: expected the names of the columns, 'id' and 'text' among them, each once")
    for utterance, rows in groupby(_tsv_rows(path, lines, columns), key=lambda row: row[1]["id"]):
        number, first = rows_first = next(rows)
        shared = {k: first[k] for k in UTTERANCE_COLUMNS if k in first}
        where = f"{path}: line {number}"
        if "duration" in shared:
            shared["duration"] = _number(shared["duration"], f"{where}: duration")
        hyps = []
        for at, row in (rows_first, *rows):
            if row.get("ref") != first.get("ref"):
                raise LowbitError(f"{path}: line {at}: utterance {utterance!r}: another 'ref' than on line {number}")
            hyp: dict[str, Any] = {k: v for k, v in row.items() if k not in UTTERANCE_COLUMNS}
            for score in ("am", "lm"):
                if score in hyp:
                    hyp[score] = _number(hyp[score], f"{path}: line {at}: {score!r}")
            hyps.append(hyp)
        yield f"line {number}", NBest.from_dict(shared | {"hyps": hyps}, where)


def _tsv_rows(path: PathLike, lines: Iterator[tuple[int, str]], columns: list[str]) -> Iterator[tuple[int, dict]]:
    """Line number and cells; an empty cell of another column than the text is left out."""
    for number, line in lines:
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise LowbitError(f"{path}: line {number}: {len(cells)} columns, but the header has {len(columns)}")
        row = {k: v for k, v in zip(columns, cells) if v or k == "text"}
        if "id" not in row:
            raise LowbitError(f"{path}: line {number}: the utterance has no 'id'")
        yield number, row


def write_tsv(path: PathLike, utterances: Iterable[NBest]) -> int:
    """The columns are those of the first utterance."""
    count, columns = 0, []
    with text_output(path) as stream:
        for utterance in utterances:
            shared = {"id": utterance.id, "ref": utterance.ref}
            shared |= {k: utterance.extra.get(k) for k in UTTERANCE_COLUMNS[2:]}
            rows = [{k: v for k, v in (shared | h.to_dict()).items() if v is not None} for h in utterance.hyps]
            if not columns:
                columns = list(rows[0])
                stream.write("\t".join(columns) + "\n")
            for row in rows:
                cells = [str(row.get(column, "")) for column in columns]
                if set(row) - set(columns) or any(set(cell) & set("\t\r\n") for cell in cells):
                    raise LowbitError(f"{path}: utterance {utterance.id!r}: a field that the header lacks, or a tab")
                stream.write("\t".join(cells) + "\n")
            count += 1
    return count
