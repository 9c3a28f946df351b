"""The native engine against model.py: every variant, instruction set, number of threads and shape of forest."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import ops
from lowbit.backend import TorchBackend
from lowbit.config import ModelConfig
from lowbit.container import write_packed
from lowbit.engine import LanguageModel
from lowbit.errors import LowbitError
from lowbit.forest import Forest, Query, in_tree_order
from lowbit.loading import load_model
from lowbit.native import NativeBackend

# d_model 64 gives forests of 16 nodes and more work for two threads; heads of 16, an FFN that is no multiple of 64, a
# vocabulary of many pieces with a ragged last one.
CONFIG = ModelConfig(vocab_size=1237, d_model=64, n_layers=2, n_heads=4, d_ffn=100, max_len=24)
VARIANTS = {
    "rotary": CONFIG,
    "learned, post, relu, untied": replace(CONFIG, position="learned", norm="post", activation="relu", tied=False),
    "sinusoidal, ragged": replace(CONFIG, position="sinusoidal", d_model=36, n_heads=3),
    "pre, relu, untied": replace(CONFIG, activation="relu", tied=False),
    "post, gelu": replace(CONFIG, norm="post"),
    "one head of 80": replace(CONFIG, d_model=80, n_heads=1, n_layers=1),
}
# Both sides compute with the same weights and differ in the order of fp32 sums, in exp (1e-7) and GELU (1e-6). These
# random models are hard: logits reach 60, so the attention is nearly one-hot and multiplies differences by as much.
# What DESIGN allows a sentence.
EXACT = 1e-3
# Where activations are rounded to int8, a difference of 1e-6 may move one of them by a step of 1/127 of its row's
# maximum. One step in one activation moves a logit of size 10 by a hundredth or so.
INT8 = 5e-2


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path_factory, pack_random):
    path = tmp_path_factory.mktemp("native") / "m.lowbit"
    write_packed(path, pack_random(request.param))
    return {compute: load_model(path, compute=compute).model for compute in ops.COMPUTE}


@pytest.fixture(scope="module")
def model(tmp_path_factory, pack_random):
    path = tmp_path_factory.mktemp("native") / "m.lowbit"
    write_packed(path, pack_random(CONFIG))
    return load_model(path).model


@pytest.fixture(autouse=True)
def _defaults():
    yield
    ops.set_isa(None)
    ops.set_threads(None)


def random_query(config: ModelConfig, nodes: int, seed: int, branching: float = 0.2) -> Query:
    """A forest of chains that branch and of new trees, with several requests at some nodes and none at others."""
    rng = np.random.default_rng(seed)
    parents = np.arange(-1, nodes - 1)
    depth = np.zeros(nodes, int)
    for i in range(nodes):
        if i and rng.random() < branching:
            parents[i] = rng.integers(max(0, i - 6), i) if rng.random() < 0.7 else -1
        if i and parents[i] >= 0 and depth[parents[i]] + 1 >= config.max_len:
            parents[i] = -1
        depth[i] = 0 if parents[i] < 0 else depth[parents[i]] + 1
    wanted = rng.integers(0, nodes, 2 * nodes)
    tokens = rng.integers(0, config.vocab_size, nodes)
    return Query(Forest(tokens, parents), wanted, rng.integers(0, config.vocab_size, 2 * nodes))


@pytest.mark.parametrize("isa", ops.available_isas())
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_forest_scores_as_the_reference(models, isa, threads):
    ops.set_isa(isa)
    for compute, tolerance in (("exact", EXACT), ("int8", INT8)):
        for nodes in (1, 2, 3, 40):
            query = random_query(models[compute].config, nodes, nodes)
            ops.set_threads(1)
            expected = TorchBackend(models[compute]).log_probs(query)
            ops.set_threads(threads)
            found = NativeBackend(models[compute], token_budget=30).log_probs(query)
            assert np.abs(found - expected).max() < tolerance, (compute, nodes)


def test_decoding_gives_the_reference_distributions(models):
    native, torch_ = NativeBackend(models["exact"]), TorchBackend(models["exact"])
    ops.set_threads(2)
    rng = np.random.default_rng(0)
    past = other = None
    for count in (3, 1, 1, 17, 2):
        tokens = rng.integers(0, CONFIG.vocab_size, count).tolist()
        past, found = native.extend(past, tokens, True)
        other, expected = torch_.extend(other, tokens, True)
        assert np.abs(found - expected).max() < EXACT
        assert np.array_equal(native.next_log_probs(past), found)
        assert np.exp(found, dtype=np.float64).sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(LowbitError, match="longer than the model's context of 24"):
        native.extend(past, [1])


@pytest.fixture(scope="module", params=["rotary", "learned"])
def deep_models(request, tmp_path_factory, pack_random):
    """With positions at which attention runs in integers, where the CPU has tiles (kDeep of csrc/cpu/forward.h)."""
    path = tmp_path_factory.mktemp("native") / "deep.lowbit"
    write_packed(path, pack_random(replace(CONFIG, max_len=80, position=request.param, d_model=96, n_heads=3)))
    return {compute: load_model(path, compute=compute).model for compute in ops.COMPUTE}


@pytest.mark.parametrize("isa", ops.available_isas())
def test_deep_nodes_are_as_near_to_exact_as_the_reference(deep_models, isa):
    """Integers move a score by 1e-4 or so, and in these models (see INT8) activations then round the other way: log P
    are others, but not worse."""
    ops.set_isa(isa)
    query = random_query(deep_models["int8"].config, 600, 3, branching=0.02)
    deep = query.forest.depths[query.nodes] >= 32
    assert deep.sum() > 200
    exact = TorchBackend(deep_models["exact"]).log_probs(query)
    backends = (NativeBackend(deep_models["int8"]), TorchBackend(deep_models["int8"]))
    errors = [np.sqrt(np.square(b.log_probs(query) - exact)[deep].mean()) for b in backends]
    # Both are means over hundreds of roundings: they agree within a tenth or so.
    assert errors[0] < 1.25 * errors[1], errors


@settings(max_examples=10)
@given(st.integers(60, 300), st.integers(0, 1000), st.sampled_from([1, 50, 1000]), st.integers(1, 4))
def test_deep_nodes_score_the_same_bits_in_any_batch(deep_models, nodes, seed, budget, threads):
    query = random_query(deep_models["int8"].config, nodes, seed, branching=0.05)
    ops.set_threads(1)
    whole = NativeBackend(deep_models["int8"], token_budget=10**6).log_probs(query)
    ops.set_threads(threads)
    assert np.array_equal(NativeBackend(deep_models["int8"], budget).log_probs(query), whole)


def test_deep_states_give_the_bits_of_scoring(deep_models):
    """Read one by one, or some together; on 1, 2 and more threads than heads."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 76)
    backend = NativeBackend(deep_models["int8"])
    scored = backend.log_probs(Query(Forest(tokens[:-1], np.arange(-1, 74)), np.arange(75), tokens[1:]))
    for threads, counts in ((1, [1] * 75), (2, [3, 30, 1, 1, 20, 2, 18]), (5, [40, *[1] * 35])):
        ops.set_threads(threads)
        block, at = None, 0
        for count in counts:
            block, found = backend.extend(block, tokens[at : at + count].tolist(), True)
            at += count
            assert found[tokens[at]] == scored[at - 1], (threads, at)


def test_the_number_of_threads_changes_nothing(model):
    query, backend = random_query(CONFIG, 90, 3), NativeBackend(model)
    results = []
    for threads in (1, 2, 3, 6):
        ops.set_threads(threads)
        scores = backend.log_probs(query)
        assert np.array_equal(scores, backend.log_probs(query))
        results.append((scores, backend.extend(None, list(range(20)), True)[1]))
    for scores, distribution in results[1:]:
        assert np.array_equal(scores, results[0][0]) and np.array_equal(distribution, results[0][1])


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_tokens_one_by_one_are_the_same_on_any_number_of_threads(tmp_path, pack_random, heads):
    """d_model 512 is worth five threads for one token: more than heads, as many as can share them, and fewer."""
    config = replace(CONFIG, d_model=512, n_heads=heads)
    write_packed(tmp_path / "m.lowbit", pack_random(config))
    backend, results = NativeBackend(load_model(tmp_path / "m.lowbit").model), []
    for threads in (1, 2, 3, 5):
        ops.set_threads(threads)
        past, found = None, []
        for token in range(12):
            past, distribution = backend.extend(past, [token], True)
            found.append(distribution)
        results.append(np.stack(found))
    assert all(np.array_equal(r, results[0]) for r in results[1:])


@settings(max_examples=20)
@given(st.integers(1, 120), st.integers(0, 1000), st.sampled_from([1, 16, 1000]), st.integers(1, 3))
def test_scores_are_the_same_bits_in_any_batch(model, nodes, seed, budget, threads):
    query = random_query(CONFIG, nodes, seed)
    ops.set_threads(1)
    whole = NativeBackend(model, token_budget=10**6).log_probs(query)
    ops.set_threads(threads)
    assert np.array_equal(NativeBackend(model, budget).log_probs(query), whole)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_decoding_gives_the_bits_of_scoring(model, isa):
    ops.set_isa(isa)
    backend, tokens = NativeBackend(model), [0, 5, 1200, 7, 7, 1236]
    query = Query(Forest(np.array(tokens), np.arange(-1, 5)), np.arange(5), np.array(tokens[1:]))
    scored, block = backend.log_probs(query), None
    for token, following, expected in zip(tokens, tokens[1:], scored):
        block, found = backend.extend(block, [token], True)
        assert found[following] == expected


def test_a_profile_covers_the_forward(model):
    query = random_query(CONFIG, 60, 1)
    seconds = NativeBackend(model).profile(query)
    assert set(seconds) == {"rows", "products", "attention", "reduce"} and min(seconds.values()) > 0


def test_trees_need_not_lie_side_by_side(model):
    # Two chains and a trie, interleaved.
    parents = np.array([-1, -1, 0, 1, 2, -1, 3, 5, 5, 4])
    query = Query(Forest(np.arange(10), parents), np.arange(10)[::-1].copy(), np.arange(10) + 5)
    ordered = in_tree_order(query)
    assert (np.diff(ordered.forest.roots) >= 0).all() and in_tree_order(ordered) is ordered
    assert np.abs(NativeBackend(model).log_probs(query) - TorchBackend(model).log_probs(query)).max() < INT8


def test_requests_are_answered_in_their_order(model):
    query = random_query(CONFIG, 30, 5)
    backend, shuffled = NativeBackend(model), np.random.default_rng(0).permutation(len(query))
    answers = backend.log_probs(query)
    again = backend.log_probs(Query(query.forest, query.nodes[shuffled], query.targets[shuffled]))
    assert np.array_equal(answers[shuffled], again)
    assert len(backend.log_probs(Query(query.forest, [], []))) == 0


def test_bad_input(model, refuses_bad_queries):
    backend = NativeBackend(model)
    refuses_bad_queries(backend, CONFIG.vocab_size, CONFIG.max_len)
    with pytest.raises(LowbitError, match="token -1 "):
        backend.extend(None, [-1])
    with pytest.raises(LowbitError, match="runs packed models only; embed is not packed"):
        NativeBackend(lowbit.TransformerLM(CONFIG))


def test_states_that_nothing_refers_to_are_evicted(tmp_path, pack_random):
    write_packed(tmp_path / "m.lowbit", pack_random(CONFIG))
    lm = lowbit.load(tmp_path / "m.lowbit")
    cache = lm.backend
    assert cache.name == "native" == lm.describe()["backend"] and cache.cache_slots == 0

    def beam() -> None:
        states = [lm.begin()]
        for step in range(40):  # past the end of the context, which slides
            states = [lm.advance(s, f"w{(7 * i + step) % 50}")[1] for i, s in enumerate(states * 2)][:4]
        assert 0 < cache.cache_slots < 4 * CONFIG.max_len * 4

    beam()
    lm._decoder._recent.clear()
    assert cache.cache_slots == 0
    size = cache.cache_bytes
    for _ in range(3):
        beam()
        lm._decoder._recent.clear()
    assert cache.cache_slots == 0 and cache.cache_bytes == size


def test_a_long_chain_of_states_dies_without_recursion(model):
    config = replace(CONFIG, max_len=20_000, d_model=8, n_heads=1, d_ffn=8, n_layers=1, vocab_size=8)
    torch.manual_seed(0)
    from lowbit.layers import QuantEmbedding, QuantLinear
    from lowbit.quantize import quantize

    def matrix(n: int, k: int) -> ops.PackedWeight:
        return ops.PackedWeight.from_quant_tensor(quantize(torch.randn(n, k), 2))

    shapes = config.matrix_shapes().items()
    modules = {
        name: QuantEmbedding(matrix(*shape)) if name == "embed" else QuantLinear(matrix(*shape), torch.zeros(shape[0]))
        for name, shape in shapes
    }
    backend, block = NativeBackend(lowbit.TransformerLM(config, modules)), None
    for _ in range(5000):
        block, _ = backend.extend(block, [1])
    assert backend.cache_slots == 5000
    del block
    assert backend.cache_slots == 0


def test_many_python_threads_share_one_engine(model):
    backend = NativeBackend(model)
    ops.set_threads(2)
    queries = [random_query(CONFIG, 20 + 9 * i, i) for i in range(8)]
    expected = [backend.log_probs(q) for q in queries]
    failures = []

    def work(i: int) -> None:
        for step in range(12):
            at = (i + step) % 8
            if not np.array_equal(backend.log_probs(queries[at]), expected[at]):
                failures.append((i, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_an_engine_outlives_what_made_it(tmp_path, pack_random):
    write_packed(tmp_path / "m.lowbit", pack_random(CONFIG))
    lm = lowbit.load(tmp_path / "m.lowbit")
    assert isinstance(lm, LanguageModel)
    state = lm.advance(lm.begin(), "w1")[1]
    lm.advance(state, "w2")
    block = state._block
    del lm, state  # the key-value cache lives as long as a block of it
    assert block.data is not None
