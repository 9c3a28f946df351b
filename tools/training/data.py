"""Corpora and the order in which training reads them; the order is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_lines
from lowbit.vocab import EOS_ID, UNK, UNK_ID, Vocab

IGNORED = -100  # target of a padding position


@dataclass(frozen=True)
class Batch:
    """``tokens`` int64 [B, T] and the token after each, ``targets`` int64 [B, T] (``IGNORED`` at padding)."""

    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    def shard(self, rank: int, world: int) -> Batch:
        """Every ``world``-th row, for data parallelism."""
        return Batch(self.tokens[rank::world], self.targets[rank::world])


def corpus_file(folder: PathLike, split: str) -> Path:
    """``split``.txt or the single *.``split``.txt in ``folder``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LowbitError(
            f"{folder}: no such data folder; it needs train.txt and valid.txt (or *.train.txt, *.valid.txt)"
        )
    exact = folder / f"{split}.txt"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"*.{split}.txt"))
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} files"
        raise LowbitError(f"{folder}: {what} {split}.txt or *.{split}.txt; exactly one is needed")
    return found[0]


def read_corpus(folder: PathLike, split: str) -> list[str]:
    """Lines of a split; blank lines are dropped, an empty file is an error."""
    path = corpus_file(folder, split)
    lines = [line for line in read_lines(path) if line.strip()]
    if not lines:
        raise LowbitError(f"{path}: the file holds no text")
    return lines


class TokenStream:
    """A corpus as one stream, ``</s>`` after every line; each epoch cuts it at another offset, shuffled."""

    def __init__(self, lines: list[str], vocab: Vocab, length: int):
        ids, self.n_oov = [EOS_ID], 0
        for line in lines:
            words, n_oov = vocab.encode(line)
            ids += [*words, EOS_ID]
            self.n_oov += n_oov
        self.ids, self.length = np.asarray(ids), length
        self.n_words = len(ids) - len(lines) - 1
        if len(self.ids) < 2 * length + 2:
            raise LowbitError(f"the text has {len(self.ids)} tokens, training on pieces of {length} needs more")

    def pieces(self, rng: np.random.Generator | None) -> list[np.ndarray]:
        """Pieces of ``length + 1`` ids; consecutive and complete without a generator (evaluation)."""
        first = 0 if rng is None else int(rng.integers(self.length))
        starts = np.arange(first, len(self.ids) - 1, self.length)
        if rng is not None:
            starts = rng.permutation(starts[starts + self.length < len(self.ids)])
        return [self.ids[s : s + self.length + 1] for s in starts]


class Sentences:
    """A corpus as single sentences, each read after ``</s>``; those longer than ``length`` are read in pieces."""

    def __init__(self, lines: list[str], vocab: Vocab, length: int):
        self.rows, self.length, self.n_words, self.n_oov = [], length, 0, 0
        for line in lines:
            words, n_oov = vocab.encode(line)
            self.n_words, self.n_oov = self.n_words + len(words), self.n_oov + n_oov
            ids = np.asarray([EOS_ID, *words, EOS_ID])
            self.rows += [ids[s : s + length + 1] for s in range(0, len(ids) - 1, length)]

    def pieces(self, rng: np.random.Generator | None) -> list[np.ndarray]:
        if rng is None:
            return self.rows
        return [self.rows[i] for i in rng.permutation(len(self.rows))]


class Batches:
    """Batches of about ``rows * length`` tokens; pieces of similar length share a batch.

    Args:
        rare_to_unk: rate at which a word seen once is replaced by ``<unk>`` while training, so that ``<unk>`` is
            learned from text that has none and the word is too.
    """

    def __init__(self, source: TokenStream | Sentences, rows: int, rare_to_unk: float = 0.0, seed: int = 0):
        self.source, self.budget, self.seed, self.rare_to_unk = (
            source,
            rows * source.length,
            seed,
            rare_to_unk,
        )
        ids = np.concatenate(source.rows) if isinstance(source, Sentences) else source.ids
        counts = np.bincount(ids, minlength=2)
        self.rare = counts == 1

    @property
    def digest(self) -> str:
        """Hash of the encoded text and of how it is cut into batches."""
        rows = self.source.rows if isinstance(self.source, Sentences) else [self.source.ids]
        state = xxhash.xxh3_64(repr((self.source.length, self.budget, self.rare_to_unk, self.seed)).encode())
        for row in rows:
            state.update(np.ascontiguousarray(row, np.int64).tobytes())
        return state.hexdigest()

    def epoch(self, epoch: int) -> list[Batch]:
        """The batches of an epoch, in training order."""
        rng = np.random.default_rng((self.seed, epoch))
        pieces = self.source.pieces(rng)
        pool = 50 * max(1, self.budget // self.source.length)
        batches = []
        for i in range(0, len(pieces), pool):
            batches += self._fill(sorted(pieces[i : i + pool], key=len, reverse=True))
        order = rng.permutation(len(batches))
        return [self._collate(batches[i], rng) for i in order]

    def evaluation(self) -> Iterator[Batch]:
        """Every token once, in order of length, with nothing replaced."""
        for group in self._fill(sorted(self.source.pieces(None), key=len, reverse=True)):
            yield self._collate(group, None)

    def _fill(self, pieces: list[np.ndarray]) -> list[list[np.ndarray]]:
        groups: list[list[np.ndarray]] = []
        for piece in pieces:
            if not groups or (len(groups[-1]) + 1) * (len(groups[-1][0]) - 1) > self.budget:
                groups.append([])
            groups[-1].append(piece)
        return groups

    def _collate(self, group: list[np.ndarray], rng: np.random.Generator | None) -> Batch:
        width = max(map(len, group)) - 1
        tokens = np.full((len(group), width), EOS_ID)
        targets = np.full((len(group), width), IGNORED)
        for row, ids in enumerate(group):
            if rng is not None and self.rare_to_unk > 0:
                replaced = self.rare[ids] & (rng.random(len(ids)) < self.rare_to_unk)
                ids = np.where(replaced, UNK_ID, ids)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def has_unk(lines: list[str]) -> bool:
    """Whether the text marks unknown words itself, as PTB does."""
    return any(UNK in line.split() for line in lines)
