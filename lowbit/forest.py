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
class Paths:
    """The requests whose sum is log P of a hypothesis, for every distinct hypothesis of many lists.

    Attributes:
        requests: int64, one distinct hypothesis after another.
        ends: int64 [U], where each of them ends in ``requests``.
        which: for every list, the distinct hypothesis of each of its own, int64 [H].
    """

    requests: np.ndarray
    ends: np.ndarray
    which: list[np.ndarray]

    def of(self, utterance: int, hypothesis: int) -> np.ndarray:
        """Requests of one hypothesis, int64 [words + 1]."""
        at = self.which[utterance][hypothesis]
        return self.requests[self.ends[at - 1] if at else 0 : self.ends[at]]


def tries(
    lists: Iterable[Sequence[Sequence[int]]],
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
    rows: list[tuple[int, ...]] = []  # of all tries: prefix, words, end
    prefixes: list[int] = []
    starts: list[int] = []  # rows that begin a trie
    long: list[tuple[int, ...]] = []
    which: list[list[int]] = []  # rows, or -1 - index of a long one
    before = itertools.repeat(()) if contexts is None else contexts
    for group, context in [(list(lists), ())] if merge else (([hyps], context) for hyps, context in zip(lists, before)):
        keys = [list(map(tuple, hyps)) for hyps in group]
        # Sorted, so that a hypothesis shares with the one before it all that it shares with any.
        distinct = sorted(set(itertools.chain.from_iterable(keys)))
        longest = max((len(words) for words in distinct if len(words) < max_len), default=0)
        prefix = (EOS_ID, *context, EOS_ID)[longest - max_len :] if len(context) else (EOS_ID,)
        found: dict[tuple[int, ...], int] = {}
        starts.append(len(rows))
        for words in distinct:
            if len(words) >= max_len:
                found[words] = -1 - len(long)
                long.append(words)
            else:
                found[words] = len(rows)
                rows.append((*prefix, *words, EOS_ID))
                prefixes.append(len(prefix))
        which += [[found[words] for words in hyps] for hyps in keys]
    query, requests, lengths = _lay_out_tries(rows, np.array(prefixes, np.int64), starts, max_nodes)
    if long:
        windowed = [windows((EOS_ID, *words, EOS_ID), max_len, stride) for words in long]
        added = chains([chain for row in windowed for chain in row])
        requests = np.concatenate([requests, np.arange(len(query), len(query) + len(added))])
        lengths = np.concatenate([lengths, [len(words) + 1 for words in long]])
        query = _join(query, added)
    index = [np.array([len(rows) - 1 - at if at < 0 else at for at in row], np.int64) for row in which]
    return query, Paths(requests, lengths.cumsum(), index)


def _lay_out_tries(
    rows: Sequence[Sequence[int]], prefixes: np.ndarray, starts: Sequence[int], max_nodes: int
) -> tuple[Query, np.ndarray, np.ndarray]:
    """Sorted rows to tries, for all of them at once: loops over words in Python took as long as the model itself.

    A row [c] holds the tokens of a prefix and of words, and then ``</s>``, for which there is no node. What a row
    shares with the one before it exists already.

    Args:
        prefixes: int64 [U], length of the part of each row that nothing is asked about.
        starts: rows at which a trie begins.

    Returns:
        the query, the requests row after row, and how many each row has, int64 [U].
    """
    if not rows:
        return chains([]), np.empty(0, np.int64), np.empty(0, np.int64)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ends = lengths.cumsum()
    tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1])
    # Every token: its column, and the token of the row before in the same column.
    column = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    above = np.arange(ends[-1]) - np.repeat(np.concatenate([[0], lengths[:-1]]), lengths)
    depths = lengths - 1
    both = np.minimum(depths, np.concatenate([[0], depths[:-1]]))  # columns in which both rows have nodes
    same = (column < np.repeat(both, lengths)) & (tokens == tokens[above])
    shared = np.minimum.reduceat(np.where(same, lengths.max(), column), ends - lengths)
    shared[[s for s in starts if s < len(rows)]] = 0
    _divide(shared, depths, max_nodes)

    new = column >= np.repeat(shared, lengths)
    is_node = column < np.repeat(depths, lengths)
    # What a row shares stands in the row before, or one before that: few steps, each twice as long, lead to where it
    # is new.
    first = np.where(new, np.arange(ends[-1]), above)
    while not new[first].all():
        first = first[first]
    asked = column >= np.repeat(prefixes, lengths)
    node_id, request_id = (new & is_node).cumsum()[first] - 1, (new & asked).cumsum()[first] - 1
    parent = np.where(column == 0, -1, np.concatenate([[-1], node_id[:-1]]))
    forest = Forest(tokens[new & is_node], parent[new & is_node])
    return Query(forest, parent[new & asked], tokens[new & asked]), request_id[asked], lengths - prefixes


def _divide(shared: np.ndarray, nodes: np.ndarray, max_nodes: int) -> None:
    """Begin another trie (``shared`` 0) before a row that would make one larger than ``max_nodes``."""
    size = 0
    for row, (common, length) in enumerate(zip(shared.tolist(), nodes.tolist())):
        size = length if common == 0 else size + length - common
        if size > max_nodes and common > 0:
            shared[row], size = 0, length


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
