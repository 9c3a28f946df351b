from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.forest import Forest, Query, ancestor_masks, chains, groups, tries, windows


@st.composite
def forests(draw, max_size: int = 40) -> Forest:
    n = draw(st.integers(1, max_size))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    return Forest(np.arange(n), np.array(parents))


def ancestors(forest: Forest, node: int) -> list[int]:
    """Root first, the node itself last."""
    path = [node]
    while forest.parents[path[-1]] >= 0:
        path.append(int(forest.parents[path[-1]]))
    return path[::-1]


@given(forests())
def test_depths_roots_and_trees(forest):
    paths = [ancestors(forest, i) for i in range(len(forest))]
    assert forest.depths.tolist() == [len(p) - 1 for p in paths]
    assert forest.roots.tolist() == [p[0] for p in paths]
    assert sorted(np.concatenate(forest.trees).tolist()) == list(range(len(forest)))
    for tree in forest.trees:
        assert len({int(forest.roots[i]) for i in tree}) == 1 and (np.diff(tree) > 0).all()


@given(forests())
def test_ancestor_mask_is_the_path_to_the_root(forest):
    for tree in forest.trees:
        mask = forest.ancestor_mask(tree)
        for i, node in enumerate(tree):
            assert tree[mask[i]].tolist() == ancestors(forest, int(node))


@given(forests(), st.integers(1, 60))
def test_groups_hold_every_node_once_with_its_mask(forest, budget):
    seen = []
    for group in groups(forest, budget):
        mask = ancestor_masks(forest.parents, group.nodes)
        assert group.nodes.shape[0] == 1 or group.nodes.size <= budget
        for row, visible in zip(group.nodes, mask):
            real = row[row >= 0]
            seen += real.tolist()
            assert (row[len(real) :] == -1).all() and visible.diagonal().all()
            for i, node in enumerate(real):
                assert row[visible[i]].tolist() == ancestors(forest, int(node))
            if group.chain:
                assert (visible[: len(real), : len(real)] == np.tri(len(real), dtype=bool)).all()
    assert sorted(seen) == list(range(len(forest)))


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_windows_predict_every_token_once(n, max_len, data):
    stride = data.draw(st.integers(1, max_len))
    text = np.arange(100, 101 + n)
    rows = windows(text, max_len, stride)
    assert np.concatenate([[], *(c.targets for c in rows)]).tolist() == text[1:].tolist()
    for chain in rows:
        assert 1 <= len(chain.targets) <= len(chain.inputs) <= max_len
        assert chain.inputs[-1] + 1 == chain.targets[-1]
        assert (np.diff(chain.inputs) == 1).all()
        if chain.inputs[0] != 100:
            # More context than what the window slides by has left over.
            assert len(chain.inputs) - len(chain.targets) >= max_len - stride


def test_chains_of_two_sentences():
    query = chains([*windows([0, 7, 8, 0], 8, 4), *windows([0, 9, 0], 8, 4)])
    assert query.forest.tokens.tolist() == [0, 7, 8, 0, 9]
    assert query.forest.parents.tolist() == [-1, 0, 1, -1, 3]
    assert query.nodes.tolist() == [0, 1, 2, 3, 4]
    assert query.targets.tolist() == [7, 8, 0, 9, 0]
    assert len(chains([])) == 0


def paths_of(query: Query, requests: np.ndarray) -> list[int]:
    """Tokens that a hypothesis' requests predict, each checked to follow the tokens before it."""
    predicted = query.targets[requests].tolist()
    for i, r in enumerate(requests):
        path = query.forest.tokens[ancestors(query.forest, int(query.nodes[r]))].tolist()
        context = [0, *predicted[:i]]
        assert context[len(context) - len(path) :] == path
    return predicted


words = st.lists(st.integers(0, 4), max_size=9)


@given(
    st.lists(st.lists(words, min_size=1, max_size=8), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
)
def test_tries_hold_every_hypothesis(lists, max_len, max_nodes, merge):
    query, paths = tries(lists, max_len, max(1, max_len // 2), max_nodes, merge=merge)
    assert paths.sizes.tolist() == [len(hyps) for hyps in lists] and len(paths.which) == sum(map(len, lists))
    for u, hyps in enumerate(lists):
        for h, ids in enumerate(hyps):
            assert paths_of(query, paths.of(u, h)) == [*ids, 0]
    assert query.forest.depths.max() < max_len


def test_trie_shares_prefixes_and_duplicates():
    lists = [[[5, 6, 7], [5, 6, 8], [5, 6, 7], [5, 6]], [[5, 6]]]
    query, paths = tries(lists, 16, 8)
    # Root, 5, 6, 7, 8 and, for the second utterance, root, 5, 6.
    assert len(query.forest) == 5 + 3
    # (root, 5) (5, 6) (6, 7) (6, 8) (6, end) (7, end) (8, end); (root, 5) (5, 6) (6, end).
    assert len(query) == 7 + 3
    assert paths.of(0, 0).tolist() == paths.of(0, 2).tolist()


def test_merged_lists_share_prefixes():
    query, paths = tries([[[5, 6, 7], [5, 6, 8], [5, 6]], [[5, 6]], [[9]]], 16, 8, merge=True)
    assert len(query.forest) == 6 and len(query.forest.trees) == 1  # root, 5, 6, 7, 8, 9
    assert paths.of(1, 0).tolist() == paths.of(0, 2).tolist()
    with pytest.raises(LowbitError, match="contexts cannot be merged"):
        tries([[[5]]], 16, 8, contexts=[[1]], merge=True)


def test_trie_of_an_empty_hypothesis_asks_for_the_end_alone():
    query, paths = tries([[[]]], 8, 4)
    assert query.forest.tokens.tolist() == [0] and query.targets.tolist() == [0]
    assert paths.of(0, 0).tolist() == [0]


def test_large_lists_are_divided():
    lists = [[[i, i + 1, i + 2] for i in range(1, 400, 3)]]
    query, _ = tries(lists, 16, 8, max_nodes=50)
    assert max(map(len, query.forest.trees)) <= 50 + 1


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [-1], "2 tokens but 1 parents"),
        ([1, 2], [-1, 1], "node 1 has parent 1"),
        ([1, 2], [-2, 0], "node 0 has parent -2"),
        ([1, -5], [-1, 0], "token -5 of node 1"),
        ([[1]], [[-1]], "one row of integers"),
        ([1.5], [-1], "one row of integers"),
    ],
)
def test_bad_forests(tokens, parents, message):
    with pytest.raises(LowbitError, match=message):
        Forest(np.array(tokens), np.array(parents))


@pytest.mark.parametrize(
    ("nodes", "targets", "message"),
    [
        ([0, 2], [1, 1], "outside a forest of 2"),
        ([-1], [1], "outside"),
        ([0], [-1], "negative"),
        ([0], [1, 2], "targets"),
    ],
)
def test_bad_queries(nodes, targets, message):
    with pytest.raises(LowbitError, match=message):
        Query(Forest(np.array([0, 1]), np.array([-1, 0])), np.array(nodes), np.array(targets))
