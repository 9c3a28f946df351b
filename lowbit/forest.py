"""Token forests: the one input of every engine (DESIGN section 6).

A sentence is a chain, an N-best list a trie whose shared prefixes are computed once, a long text a row of overlapping
chains. What is asked of a forest is always the same: log P(next token | path from the root to a node).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowbit import ops
from lowbit.errors import LowbitError
from lowbit.vocab import EOS_ID


@dataclass(frozen=True, eq=False)
class Forest:
    """Nodes in an order in which parents come first.

    Attributes:
        tokens: int32 [n], token id of every node.
        parents: int32 [n], index of the parent, smaller than the node's own; -1 for a root.

    Raises:
        LowbitError: arrays of different length, or a parent that does not come before its child.
    """

    tokens: np.ndarray
    parents: np.ndarray

    def __post_init__(self) -> None:
        for name in ("tokens", "parents"):
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise LowbitError(f"forest: {name} must be one row of integers, not {array.dtype} {array.shape}")
            object.__setattr__(self, name, array.astype(np.int32, copy=False))
        if len(self.tokens) != len(self.parents):
            raise LowbitError(f"forest: {len(self.tokens)} tokens but {len(self.parents)} parents")
        if self.tokens.size and self.tokens.min() < 0:
            raise LowbitError(f"forest: token {self.tokens.min()} of node {self.tokens.argmin()} is negative")
        bad = np.flatnonzero((self.parents < -1) | (self.parents >= np.arange(len(self.parents))))
        if bad.size:
            node = bad[0]
            raise LowbitError(f"forest: node {node} has parent {self.parents[node]}, not -1 or an earlier node")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _ancestry(self) -> tuple[np.ndarray, np.ndarray]:
        """Depths and root nodes by pointer doubling: log2(depth) vectorised steps instead of a loop over nodes."""
        node = np.arange(len(self), dtype=np.int32)
        depths = (self.parents >= 0).astype(np.int32)
        jump = np.where(self.parents < 0, node, self.parents)
        while (depths[jump] > 0).any():
            depths = depths + depths[jump]
            jump = jump[jump]
        return depths, jump

    @property
    def depths(self) -> np.ndarray:
        """int32 [n], edges between a node and its root: the node's position."""
        return self._ancestry[0]

    @property
    def roots(self) -> np.ndarray:
        """int32 [n], root of every node."""
        return self._ancestry[1]

    @cached_property
    def trees(self) -> list[np.ndarray]:
        """Nodes of every tree, ascending, in the order of the roots."""
        order = np.argsort(self.roots, kind="stable")
        starts = np.flatnonzero(np.diff(self.roots[order], prepend=-1))
        return np.split(order, starts[1:]) if len(self) else []

    def ancestor_mask(self, nodes: np.ndarray) -> np.ndarray:
        """Which of the nodes of one tree each of them sees: itself and its ancestors.

        Args:
            nodes: int [T], all nodes of a tree, ascending.

        Returns:
            bool [T, T], row = the node that looks.
        """
        return ancestor_masks(self.parents, nodes[None])[0]


@dataclass(frozen=True, eq=False)
class Query:
    """A forest and the (node, next token) pairs whose log-probabilities are wanted.

    Attributes:
        nodes, targets: int64 [R].

    Raises:
        LowbitError: a node outside the forest, a negative target, or rows of different length.
    """

    forest: Forest
    nodes: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        for name in ("nodes", "targets"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        if self.nodes.shape != self.targets.shape or self.nodes.ndim != 1:
            raise LowbitError(f"query: {self.nodes.shape} nodes but {self.targets.shape} targets")
        if self.nodes.size and not 0 <= self.nodes.min() <= self.nodes.max() < len(self.forest):
            raise LowbitError(f"query: node {self.nodes.max()} is outside a forest of {len(self.forest)} nodes")
        if self.targets.size and self.targets.min() < 0:
            raise LowbitError(f"query: target token {self.targets.min()} is negative")

    def __len__(self) -> int:
        return len(self.nodes)


def in_tree_order(query: Query) -> Query:
    """The same query with the nodes of every tree side by side: what the native engine reads."""
    roots = query.forest.roots
    if (roots[1:] >= roots[:-1]).all():
        return query
    order = np.argsort(roots, kind="stable")
    place = np.empty(len(order) + 1, np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    place[-1] = -1
    forest = Forest(query.forest.tokens[order], place[query.forest.parents[order]])
    return Query(forest, place[query.nodes], query.targets)


@dataclass(frozen=True, eq=False)
class Chain:
    """One window of a text: ``inputs`` int32 [T] are read, ``targets`` int32 [S] follow the last S of them."""

    inputs: np.ndarray
    targets: np.ndarray


def windows(tokens: Sequence[int] | np.ndarray, max_len: int, stride: int) -> list[Chain]:
    """Cut a text into windows of at most ``max_len`` inputs; every token but the first is a target exactly once.

    The first window predicts all its targets; each later one starts ``stride`` tokens further and predicts the last
    ``stride``, so that every prediction after the first ``max_len`` sees more than ``max_len - stride`` tokens.

    Args:
        tokens: int [n + 1], the context token and the n tokens to predict.
    """
    check_stride(stride, max_len)
    text = np.asarray(tokens, dtype=np.int32)
    n = len(text) - 1
    chains, start, scored = [], 0, 0
    while scored < n:
        end = min(start + max_len, n)
        chains.append(Chain(text[start:end], text[scored + 1 : end + 1]))
        scored, start = end, start + stride
    return chains


def check_stride(stride: int, max_len: int) -> None:
    if not 1 <= stride <= max_len:
        raise LowbitError(f"stride must lie between 1 and the model's context of {max_len} tokens, not {stride}")


def chains(rows: Iterable[Chain]) -> Query:
    """A forest with one chain per window; requests in the order of the targets."""
    rows = list(rows)
    if not rows:
        return Query(Forest(np.empty(0, np.int32), np.empty(0, np.int32)), np.empty(0), np.empty(0))
    lengths = np.array([len(c.inputs) for c in rows])
    ends = lengths.cumsum()
    parents = np.arange(-1, ends[-1] - 1, dtype=np.int32)
    parents[ends - lengths] = -1
    nodes = np.concatenate([np.arange(end - len(c.targets), end) for c, end in zip(rows, ends)])
    return Query(
        Forest(np.concatenate([c.inputs for c in rows]), parents),
        nodes,
        np.concatenate([c.targets for c in rows]),
    )


@dataclass(frozen=True, eq=False)
class Lists:
    """The hypotheses of many N-best lists, as words of a vocabulary without ``</s>``.

    Attributes:
        words: int32, one hypothesis after another.
        ends: int64 [H], where each of them ends in ``words``.
        sizes: int64 [U], hypotheses of every list.
    """

    words: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[Sequence[Sequence[int]]]) -> Lists:
        """From token ids by list, hypothesis and word."""
        lists = list(lists)
        rows = [words for hyps in lists for words in hyps]
        words = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
        return cls(words, _ends(map(len, rows)), np.fromiter(map(len, lists), np.int64))

    def row(self, index: int) -> np.ndarray:
        """Words of one hypothesis, int32."""
        return self.words[self.ends[index - 1] if index else 0 : self.ends[index]]


def _ends(lengths: Iterable[int]) -> np.ndarray:
    return np.fromiter(lengths, np.int64).cumsum()


@dataclass(frozen=True, eq=False)
class Paths:
    """The requests whose sum is log P of a hypothesis, for every distinct hypothesis of many lists.

    Attributes:
        requests: int64, one distinct hypothesis after another.
        ends: int64 [D], where each of them ends in ``requests``.
        which: int64 [H], the distinct hypothesis that each one is.
        sizes: int64 [U], hypotheses of every list.
    """

    requests: np.ndarray
    ends: np.ndarray
    which: np.ndarray
    sizes: np.ndarray

    def of(self, utterance: int, hypothesis: int) -> np.ndarray:
        """Requests of one hypothesis, int64 [words + 1]."""
        at = self.which[self.sizes[:utterance].sum() + hypothesis]
        return self.requests[self.ends[at - 1] if at else 0 : self.ends[at]]


def tries(
    lists: Lists | Iterable[Sequence[Sequence[int]]],
    max_len: int,
    stride: int,
    max_nodes: int = 512,
    contexts: Iterable[Sequence[int]] | None = None,
    merge: bool = False,
) -> tuple[Query, Paths]:
    """One trie per N-best list: shared prefixes once, duplicates collapse.

    Args:
        lists: per utterance the token ids of its hypotheses, without ``</s>``.
        contexts: per utterance the text before it, without the ``</s>`` between them; as much of its end is read as
            leaves room for the longest hypothesis.
        max_len: hypotheses that need more inputs than this are read as windows (:func:`windows`) beside the tries.
        max_nodes: a trie that would grow beyond this is continued in another one; bounds the attention mask.
        merge: all lists as one, so that what they have in common is computed once; not with contexts.
    """
    if merge and contexts is not None:
        raise LowbitError("tries: lists that are read after contexts cannot be merged")
    if not isinstance(lists, Lists):
        lists = Lists.of(lists)
    groups = np.array([len(lists.ends)], np.int64) if merge else lists.sizes.cumsum()
    prefixes = [(EOS_ID,)] * len(groups) if contexts is None else _prefixes(lists, groups, contexts, max_len)
    tokens, parents, nodes, targets, requests, ends, which = ops.tries(
        lists.words, lists.ends, groups, np.fromiter(itertools.chain.from_iterable(prefixes), np.int32),
        _ends(map(len, prefixes)), max_len - 1, max_nodes, EOS_ID,
    )  # fmt: skip
    query = Query(Forest(tokens, parents), nodes, targets)
    if (long := np.flatnonzero(which < 0)).size:
        rows = [(EOS_ID, *lists.row(i).tolist(), EOS_ID) for i in long]
        distinct = {row: len(ends) + i for i, row in enumerate(dict.fromkeys(rows))}
        which[long] = [distinct[row] for row in rows]
        added = chains([chain for row in distinct for chain in windows(row, max_len, stride)])
        requests = np.concatenate([requests, np.arange(len(query), len(query) + len(added))])
        ends = np.concatenate([ends, (ends[-1] if len(ends) else 0) + _ends(len(row) - 1 for row in distinct)])
        query = _join(query, added)
    return query, Paths(requests, ends, which, lists.sizes)


def _prefixes(
    lists: Lists, groups: np.ndarray, contexts: Iterable[Sequence[int]], max_len: int
) -> list[tuple[int, ...]]:
    """What is read before the hypotheses of every list: as much of its context as leaves room for the longest."""
    lengths = np.diff(lists.ends, prepend=0)
    prefixes = []
    for end, size, context in zip(groups, lists.sizes, contexts):
        longest = max((n for n in lengths[end - size : end].tolist() if n < max_len), default=0)
        prefixes.append((EOS_ID, *context, EOS_ID)[longest - max_len :] if len(context) else (EOS_ID,))
    return prefixes


def _join(a: Query, b: Query) -> Query:
    """Two queries as one, ``b``'s trees and requests after those of ``a``."""
    n = len(a.forest)
    parents = np.where(b.forest.parents < 0, -1, b.forest.parents + n)
    forest = Forest(np.concatenate([a.forest.tokens, b.forest.tokens]), np.concatenate([a.forest.parents, parents]))
    return Query(forest, np.concatenate([a.nodes, b.nodes + n]), np.concatenate([a.targets, b.targets]))


@dataclass(frozen=True, eq=False)
class Group:
    """Trees of similar size, padded to one batch.

    Attributes:
        nodes: int64 [B, T], -1 where padded (at the end of a row).
        chain: every tree is a chain, so a causal mask does.
    """

    nodes: np.ndarray
    chain: bool


def groups(forest: Forest, token_budget: int) -> Iterator[Group]:
    """Divide the trees of a forest into batches of at most ``token_budget`` padded tokens (or a single larger tree).

    Trees are sorted by size, and a batch that is worth its overhead ends before a tree that would be a quarter padding.
    """
    trees = forest.trees
    # Every tree that is a chain has its nodes' depths ascending one by one.
    is_chain = [bool(forest.depths[t[-1]] == len(t) - 1) for t in trees]
    for kind in (True, False):
        row: list[np.ndarray] = []
        for tree in sorted((t for t, c in zip(trees, is_chain) if c is kind), key=len, reverse=True):
            if row:
                padded = len(row) * len(row[0])
                wasteful = 4 * len(tree) < 3 * len(row[0]) and 4 * padded >= token_budget
                if padded + len(row[0]) > token_budget or wasteful:
                    yield Group(_pad(row), kind)
                    row = []
            row.append(tree)
        if row:
            yield Group(_pad(row), kind)


def _pad(trees: Sequence[np.ndarray]) -> np.ndarray:
    out = np.full((len(trees), max(map(len, trees))), -1, np.int64)
    for i, tree in enumerate(trees):
        out[i, : len(tree)] = tree
    return out


def ancestor_masks(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Ancestor masks of a batch of trees.

    Args:
        parents: int32 [n], of the whole forest.
        nodes: int [B, T], all nodes of B trees, ascending, padded with -1.

    Returns:
        bool [B, T, T]; a padding position sees itself only, so that its softmax stays finite.
    """
    batch, length = nodes.shape
    slot = np.zeros(len(parents) + 1, np.int64)
    for row in nodes:
        real = row[row >= 0]
        slot[real] = np.arange(len(real))
    mask = np.zeros((batch, length, length), bool)
    rows = np.arange(batch)
    for t in range(length):
        parent = np.where(nodes[:, t] >= 0, parents[nodes[:, t]], -1)
        mask[:, t] = mask[rows, slot[parent]] & (parent >= 0)[:, None]
        mask[:, t, t] = True
    return mask
