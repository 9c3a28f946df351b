"""The adapter in pyctcdecode's own beam search, against an exhaustive search over all alignments."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

import lowbit
from lowbit.backend import TorchBackend
from lowbit.config import ModelConfig
from lowbit.container import write_packed
from lowbit.ctc import CTCLanguageModel
from lowbit.engine import LanguageModel
from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=6, d_model=32, n_layers=2, n_heads=2, d_ffn=48, max_len=12)
VOCAB = Vocab(["</s>", "<unk>", "a", "ab", "b", "ba"])
LABELS = ["", " ", "a", "b"]  # the first is CTC's blank
FRAMES = 7


@pytest.fixture(scope="module", params=["fp32", "packed"])
def lm(request, tmp_path_factory, pack_random) -> LanguageModel:
    """In full precision; and a packed file on the native engine, its activations exact, so that they are the same in a
    state and in a whole sentence but for the order of sums."""
    torch.manual_seed(0)
    if request.param == "fp32":
        return LanguageModel(TorchBackend(TransformerLM(CONFIG)), CONFIG, VOCAB)
    path = tmp_path_factory.mktemp("ctc") / "m.lowbit"
    write_packed(path, replace(pack_random(CONFIG), vocab=VOCAB))
    return lowbit.load(path, compute="exact")


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=1, keepdims=True)


def language_score(lm: LanguageModel, text: str, alpha: float, beta: float, offset: float) -> float:
    """The same quantity from whole-sentence scores."""
    (score,) = lm.score([text])
    return alpha * (score.logprob + offset * score.oov) + beta * len(text.split())


def all_texts(logits: np.ndarray) -> dict[str, float]:
    """log P(text | logits) of every text, summed over all alignments."""
    found: dict[str, float] = defaultdict(lambda: -np.inf)
    for path in itertools.product(range(len(LABELS)), repeat=FRAMES):
        collapsed = [label for label, _ in itertools.groupby(path)]
        text = " ".join("".join(LABELS[i] for i in collapsed).split())
        found[text] = np.logaddexp(found[text], sum(logits[t, i] for t, i in enumerate(path)))
    return found


@pytest.mark.parametrize(("seed", "alpha", "beta"), [(0, 0.0, 0.0), (1, 0.7, 1.0), (2, 1.5, 0.5), (3, 3.0, 2.0)])
def test_beam_search_finds_the_best_text(lm, seed, alpha, beta):
    pyctcdecode = pytest.importorskip("pyctcdecode", reason="pyctcdecode is not installed (pip install lowbit[ctc])")
    logits = log_softmax(2 * np.random.default_rng(seed).standard_normal((FRAMES, len(LABELS))))
    model = CTCLanguageModel(lm, alpha, beta)
    decoder = pyctcdecode.BeamSearchDecoderCTC(pyctcdecode.Alphabet.build_alphabet(list(LABELS)), model)
    # Wide enough to lose nothing, and no beam merged for its recent words only.
    options = {"beam_width": 5000, "beam_prune_logp": -1e9, "token_min_logp": -1e9, "prune_history": False}
    beams = decoder.decode_beams(logits, **options)
    texts = all_texts(logits)
    scores = {text: p + language_score(lm, text, alpha, beta, -10.0) for text, p in texts.items()}
    # The decoder tells texts apart whose spaces differ ("a", "a "): the best of all is compared, and every score.
    for text, state, _, acoustic, combined in beams[:20]:
        assert combined - acoustic == pytest.approx(language_score(lm, text, alpha, beta, -10.0), abs=1e-4)
        # One place for the sentence boundary before the words.
        assert state.length == len(text.split()) + 1
    best = max(scores, key=scores.__getitem__)
    assert beams[0][0] == best


def test_it_has_all_methods_of_the_interface(lm):
    pyctcdecode = pytest.importorskip("pyctcdecode", reason="pyctcdecode is not installed (pip install lowbit[ctc])")
    from pyctcdecode.language_model import AbstractLanguageModel

    assert pyctcdecode is not None
    assert all(hasattr(CTCLanguageModel, name) for name in AbstractLanguageModel.__abstractmethods__)
    assert CTCLanguageModel(lm).order == CONFIG.max_len


def test_words_states_and_ends(lm):
    model = CTCLanguageModel(lm, alpha=2.0, beta=0.5)
    score, state = model.score(model.get_start_state(), "a")
    assert score == pytest.approx(2 * lm.advance(lm.begin(), "a")[0] + 0.5)
    last, extended = model.score(state, "ba", is_last_word=True)
    step, after = lm.advance(state, "ba")
    assert last == pytest.approx(2 * (step + lm.advance(after, "</s>")[0]) + 0.5)
    assert extended.length == after.length
    assert model.score(state, "", is_last_word=True)[0] == pytest.approx(2 * lm.advance(state, "</s>")[0])
    model.reset_params(score_boundary=False, alpha=1.0, beta=None)
    assert model.score(state, "", is_last_word=True) == (0.0, state)
    assert model.score(state, "zz")[0] == pytest.approx(lm.advance(state, "zz")[0] - 10.0 + 0.5)


def test_partial_words(lm):
    model = CTCLanguageModel(lm)
    assert [model.score_partial_token(t) for t in ("a", "ab", "b", "abb", "c")] == [0, 0, 0, -10.0, -10.0]
    assert model.score_partial_token("c" * 12) == -20.0


def test_bad_parameters(lm):
    with pytest.raises(LowbitError, match="alpha must be a finite number"):
        CTCLanguageModel(lm, alpha=float("nan"))
    with pytest.raises(LowbitError, match="no parameter 'gamma'"):
        CTCLanguageModel(lm).reset_params(gamma=1.0)
    with pytest.raises(LowbitError, match=r"save the \.lowbit file"):
        CTCLanguageModel(lm).save_to_dir("x")
