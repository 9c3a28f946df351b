from __future__ import annotations

import math
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
from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel, write_packed
from lowbit.engine import LanguageModel
from lowbit.errors import FormatError, LowbitError
from lowbit.model import TransformerLM
from lowbit.nbest import Hypothesis, NBest
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=12, d_model=32, n_layers=2, n_heads=2, d_ffn=48, max_len=10)
VARIANTS = {
    "rotary": CONFIG,
    "learned, post, relu, untied": replace(CONFIG, position="learned", norm="post", activation="relu", tied=False),
    "sinusoidal": replace(CONFIG, position="sinusoidal"),
}
WORDS = [chr(ord("a") + i) for i in range(10)]
# The test models compute in fp64, so what differs between two ways to one number is the rounding of the logits and of
# the result to fp32: 4 roundings of 6e-8 relative, on numbers below 20.
TOKEN_TOLERANCE = 5e-6

sentences = st.lists(st.sampled_from([*WORDS, "unseen"]), max_size=16).map(" ".join)


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(config)
    with torch.no_grad():
        # Larger than at the start of training, so that contexts matter.
        for p in model.parameters():
            p.mul_(2.0)
    return model.to(dtype).eval()


def make_vocab() -> Vocab:
    return Vocab(["</s>", "<unk>", *WORDS])


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def lm(request) -> LanguageModel:
    return LanguageModel(TorchBackend(make_model(request.param), token_budget=64), request.param, make_vocab())


@pytest.fixture(scope="module")
def one() -> LanguageModel:
    return LanguageModel(TorchBackend(make_model(CONFIG), token_budget=64), CONFIG, make_vocab())


@torch.no_grad()
def naive(lm: LanguageModel, ids: list[int], stride: int) -> list[float]:
    """log P of every token after the first, each from its own forward over its window's context."""
    out, n = [], lm.config.max_len
    for i in range(len(ids) - 1):
        start = max(0, math.ceil((i + 1 - n) / stride)) * stride
        logits = lm.backend.model(torch.tensor([ids[start : i + 1]]))[0, -1]
        out.append(float(logits.log_softmax(-1)[ids[i + 1]]))
    return out


@settings(max_examples=25)
@given(st.lists(sentences, min_size=1, max_size=5))
def test_score_is_the_models_probability(lm, lines):
    for line, score in zip(lines, lm.score(lines)):
        ids, oov = lm.vocab.encode(line)
        expected = naive(lm, [0, *ids, 0], lm.stride)
        assert np.allclose(score.token_logprobs, expected, rtol=0, atol=TOKEN_TOLERANCE)
        assert score.logprob == pytest.approx(sum(expected), abs=len(expected) * TOKEN_TOLERANCE)
        assert score.oov == oov == line.split().count("unseen")
        assert score.tokens == [w if w != "unseen" else "<unk>" for w in line.split()] + ["</s>"]


def test_score_of_nothing(one):
    assert one.score([]) == []
    (empty,) = one.score([""])
    assert empty.tokens == ["</s>"] and empty.logprob == empty.token_logprobs[0] < 0
    with pytest.raises(LowbitError, match="list of sentences"):
        one.score("a b")


def test_probabilities_sum_to_one(one):
    first = sum(math.exp(one.score([f"a {w}"])[0].token_logprobs[1]) for w in [*WORDS, "unseen"])
    end = math.exp(one.score(["a"])[0].token_logprobs[1])
    assert first + end == pytest.approx(1, abs=1e-5)


@settings(max_examples=25)
@given(st.lists(st.lists(sentences, min_size=1, max_size=6), min_size=1, max_size=3))
def test_a_trie_scores_as_each_hypothesis_alone(lm, lists):
    lists = [[*hyps, hyps[0]] for hyps in lists]
    for hyps, scores in zip(lists, lm.score_nbest(lists)):
        for hyp, logprob, words, oov in zip(hyps, scores.logprobs, scores.words, scores.oov):
            (alone,) = lm.score([hyp])
            assert logprob == pytest.approx(alone.logprob, abs=len(alone.tokens) * TOKEN_TOLERANCE)
            assert (words, oov) == (len(hyp.split()), alone.oov)
        assert scores.logprobs[-1] == scores.logprobs[0]


@settings(max_examples=25)
@given(st.lists(sentences, min_size=2, max_size=9), st.sampled_from([1, 7, 4096]))
def test_scores_do_not_depend_on_the_batch(one, lines, budget):
    other = LanguageModel(TorchBackend(one.backend.model, token_budget=budget), CONFIG, one.vocab)
    for a, b in zip(one.score(lines), other.score(lines)):
        assert np.allclose(a.token_logprobs, b.token_logprobs, rtol=0, atol=TOKEN_TOLERANCE)
    assert one.score(lines) == one.score(lines)


@settings(max_examples=25)
@given(sentences)
def test_advance_adds_up_to_score(lm, line):
    (score,) = lm.score([line])
    state, found = lm.begin(), []
    for word in [*line.split(), "</s>"]:
        logprob, state = lm.advance(state, word)
        found.append(logprob)
    assert np.allclose(found, score.token_logprobs, rtol=0, atol=TOKEN_TOLERANCE)
    assert state.oov == score.oov and state.length <= lm.config.max_len


def test_states_are_immutable(one):
    _, a = one.advance(one.begin(), "a")
    before, ab = one.advance(a, "b")
    one.advance(ab, "c")
    one.advance(a, "c")
    assert one.advance(a, "b")[0] == before
    # Beyond the context, too, and with the distributions of 200 younger states computed in between.
    state = a
    for i in range(200):
        _, state = one.advance(state, WORDS[i % 10])
    assert one.advance(a, "b")[0] == before


def test_bad_advances(one):
    other = LanguageModel(one.backend, CONFIG, one.vocab)
    with pytest.raises(LowbitError, match="not made by this model"):
        one.advance(other.begin(), "a")
    with pytest.raises(LowbitError, match="takes one word"):
        one.advance(one.begin(), "a b")
    with pytest.raises(LowbitError, match="takes one word"):
        one.advance(one.begin(), "")


@settings(max_examples=25)
@given(st.lists(sentences.filter(bool), min_size=1, max_size=6), st.integers(1, 10))
def test_stream_counts_every_token_once(lm, lines, stride):
    result = lm.evaluate(["", *lines], "stream", stride)
    ids = [0]
    for line in lines:
        ids += [*lm.vocab.encode(line)[0], 0]
    expected = naive(lm, ids, stride)
    assert np.allclose(-result.token_nll, expected, rtol=0, atol=TOKEN_TOLERANCE)
    assert result.n_tokens == len(expected) and result.n_lines == len(lines) and result.stride == stride
    assert result.n_oov == " ".join(lines).split().count("unseen")
    assert result.ppl == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)
    assert lm.perplexity(lines, "stream", stride) == result.ppl


def test_sentence_perplexity_is_that_of_the_scores(one):
    lines = ["a b c", "d", "e f unseen a"]
    total = sum(s.logprob for s in one.score(lines))
    assert one.perplexity(lines, "sentence") == pytest.approx(math.exp(-total / 11), rel=1e-5)
    assert one.evaluate(lines, "sentence").stride == 5


def test_a_hopeless_model_has_an_infinite_perplexity(one, monkeypatch):
    monkeypatch.setattr(one.backend, "log_probs", lambda query: np.full(len(query), -1e4, np.float32))
    assert one.perplexity(["a"]) == math.inf


def test_progress_counts_all_tokens(one, monkeypatch):
    monkeypatch.setattr("lowbit.engine._FOREST_TOKENS", 20)
    counts = []
    result = one.evaluate(["a b c d"] * 9, "sentence", progress=counts.append)
    assert sum(counts) == result.n_tokens == 45 and len(counts) > 1


def test_many_windows_are_read_in_several_forests(one, monkeypatch):
    whole = one.evaluate(["a b c d"] * 20, "stream").token_nll
    monkeypatch.setattr("lowbit.engine._FOREST_TOKENS", 25)
    assert np.allclose(one.evaluate(["a b c d"] * 20, "stream").token_nll, whole, rtol=0, atol=TOKEN_TOLERANCE)


def test_bad_evaluations(one):
    for arguments, message in [
        ((["a"], "words"), "mode must be"),
        ((["", " "],), "holds no words"),
        ((["a"], "stream", 11), "stride must lie between 1 and"),
        ((["a"], "stream", 0), "stride must lie between 1 and"),
        (("a b",), "list of lines"),
    ]:
        with pytest.raises(LowbitError, match=message):
            one.evaluate(*arguments)


def test_generate(one):
    text = one.generate("a b", 30, seed=3)
    assert text == one.generate("a b", 30, seed=3)
    assert text.startswith("a b") and len(text.split()) <= 32 and "</s>" not in text
    assert len({one.generate("a b", 30, seed=s) for s in range(8)}) > 1
    assert one.generate("a b", 0) == "a b"
    greedy = one.generate("a", 20, temperature=0)
    assert greedy == one.generate("a", 20, top_k=1, seed=5)
    # Greedy by hand, over a prompt longer than the context and with an unknown word.
    prompt = "unseen " + "a b c d e " * 4
    state = one.begin()
    for word in prompt.split():
        _, state = one.advance(state, word)
    best = max([*WORDS, "</s>", "<unk>"], key=lambda w: one.advance(state, w)[0])
    expected = prompt.split() + ([] if best == "</s>" else [best])
    assert one.generate(prompt, 1, temperature=0).split() == expected


def test_generate_samples_the_distribution(one):
    state = one.begin()
    expected = {w: math.exp(one.advance(state, w)[0]) for w in WORDS}
    drawn = [one.generate("", 1, seed=s) for s in range(400)]
    for word, p in expected.items():
        # Five standard errors of a binomial share, for ten words.
        assert abs(drawn.count(word) / 400 - p) < 5 * math.sqrt(p * (1 - p) / 400) + 1e-9


def test_a_vanishing_temperature_is_greedy(one):
    assert one.generate("a", 20, temperature=1e-310, seed=5) == one.generate("a", 20, temperature=0)


def test_bad_generate(one):
    with pytest.raises(LowbitError, match="seed must be an integer from 0, not -1"):
        one.generate("a", 3, seed=-1)
    for options in ({"max_new_tokens": -1}, {"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}):
        with pytest.raises(LowbitError, match="must be at least"):
            one.generate("a", **({"max_new_tokens": 3} | options))


def test_rescore_sorts_by_the_combined_score(one):
    texts = ["a b", "c d e", "", "c d e"]
    lists = [
        NBest("am", [Hypothesis(t, am=-float(i), extra={"keep": i}) for i, t in enumerate(texts)], "c", {"spk": "s"}),
        NBest("rank", [Hypothesis(t) for t in texts]),
    ]
    logprobs = [s.logprob for s in one.score(texts)]
    for before, after in zip(lists, one.rescore(lists, lm_weight=0.7, length_bonus=0.3)):
        expected = [-i + 0.7 * p + 0.3 * len(t.split()) for i, (t, p) in enumerate(zip(texts, logprobs))]
        found = [h.extra["score"] for h in after.hyps]
        assert found == sorted(found, reverse=True)
        assert np.allclose(sorted(found), sorted(expected), rtol=0, atol=1e-4)
        assert after.extra == before.extra | {"first_pass": before.id, "oov": 0}
        assert sorted(h.text for h in after.hyps) == sorted(texts) and after.ref == before.ref
    assert [h.text for h in one.rescore(lists, 0.0)[1].hyps] == texts
    assert [h.extra["keep"] for h in one.rescore(lists, 0.0)[0].hyps] == [0, 1, 2, 3]


def test_threads_share_a_model(one):
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(10)]
    expected, found = one.score(lines), {}

    def work(i: int) -> None:
        state, total = one.begin(), 0.0
        for word in [*lines[i].split(), "</s>"]:
            logprob, state = one.advance(state, word)
            total += logprob
        found[i] = (one.score(lines), total)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, (scores, total) in found.items():
        assert scores == expected
        assert total == pytest.approx(expected[i].logprob, abs=1e-4)
    assert len(found) == 6


def test_bad_queries_do_not_reach_the_model(one, refuses_bad_queries):
    refuses_bad_queries(one.backend, CONFIG.vocab_size, CONFIG.max_len)


# Loading.

PLANS = [(1, None, None), (2, "ternary", None), (2, None, 64), (4, None, None), (8, None, None), (4, "pow2", None)]


def packed_and_twin(config: ModelConfig, path) -> TransformerLM:
    """Write a packed file that cycles through bits and tables; return the dense model of its dequantized weights."""
    model = make_model(config, torch.float32)
    tensors = dict(model.named_parameters())
    matrices = {}
    with torch.no_grad():
        for i, name in enumerate(config.matrix_shapes()):
            q = quantize(tensors[f"{name}.weight"].detach(), *PLANS[i % len(PLANS)])
            tensors[f"{name}.weight"].copy_(q.dequantize())
            matrices[name] = PackedMatrix.from_quant_tensor(q)
        vectors = {name: tensors[name].detach().half().float() for name in config.vector_shapes()}
        for name, vector in vectors.items():
            tensors[name].copy_(vector)
    write_packed(path, PackedModel(config, make_vocab(), matrices, vectors, 4 * config.n_parameters() + 999))
    return model


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_packed_model_scores_as_its_dense_twin(tmp_path, config):
    path = tmp_path / "model.lowbit"
    twin = LanguageModel(TorchBackend(packed_and_twin(config, path)), config, make_vocab())
    lines = ["a b c d", "", "j i h unseen f e d c b a j i h"]
    exact, rounded = lowbit.load(path, compute="exact"), lowbit.load(path)
    for a, b, c in zip(twin.score(lines), exact.score(lines), rounded.score(lines)):
        assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
        # Activations rounded to 8 bits: a relative error of up to 1/254 an input, which averages out in sums; the
        # bound only tells a wrong scale or layout (errors of order 1 a token) from rounding.
        assert c.logprob == pytest.approx(a.logprob, abs=0.2 * len(a.tokens))
    assert np.allclose(
        exact.score_nbest([lines])[0].logprobs, [s.logprob for s in twin.score(lines)], rtol=0, atol=1e-3
    )


def test_describe_tells_what_runs(tmp_path):
    packed_and_twin(CONFIG, tmp_path / "m.lowbit")
    told = lowbit.load(tmp_path / "m.lowbit", compute="exact", threads=1).describe()
    assert told["kind"] == "packed" and told["precision"] == "1/2/4/8 bits" and told["compute"] == "exact"
    assert told["isa"] == ops.isa() and told["isa"] in told["kernel"] and told["device"] == "cpu"
    assert told["bytes"] == (tmp_path / "m.lowbit").stat().st_size and told["threads"] == 1
    ops.set_threads(None)
    Checkpoint.of_model(make_model(CONFIG, torch.float32), make_vocab()).save(tmp_path / "m.safetensors")
    told = lowbit.load(tmp_path / "m.safetensors").describe()
    assert (told["kind"], told["precision"], told["kernel"]) == ("checkpoint", "fp32", "torch")


def test_a_checkpoint_scores_as_its_model(tmp_path, one):
    Checkpoint.of_model(make_model(CONFIG, torch.float32), one.vocab).save(tmp_path / "m.safetensors")
    loaded = lowbit.load(tmp_path / "m.safetensors")
    # fp32 against fp64: what DESIGN allows a sentence.
    assert loaded.score(["a b c"])[0].logprob == pytest.approx(one.score(["a b c"])[0].logprob, abs=1e-3)


def test_bad_loads(tmp_path):
    packed_and_twin(CONFIG, tmp_path / "m.lowbit")
    data = (tmp_path / "m.lowbit").read_bytes()
    (tmp_path / "cut.lowbit").write_bytes(data[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    cases = [
        (("missing.lowbit",), {}, LowbitError, "no such model file"),
        (("cut.lowbit",), {}, FormatError, "cut.lowbit"),
        (("text.safetensors",), {}, FormatError, "text.safetensors"),
        (("m.lowbit",), {"compute": "fp16"}, LowbitError, "compute must be one of"),
        (("m.lowbit",), {"device": "tpu"}, LowbitError, "device must be"),
        (("m.lowbit",), {"threads": 0}, LowbitError, "threads must be"),
    ]
    if not torch.cuda.is_available():
        cases.append((("m.lowbit",), {"device": "cuda"}, LowbitError, "no CUDA GPU"))
    for (name,), options, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            lowbit.load(tmp_path / name, **options)
        assert "\n" not in str(error.value)
