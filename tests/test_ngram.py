from __future__ import annotations

import math

import numpy as np
import pytest
from backoff import log10_prob
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.ngram import NGram

# log10 P, and log10 of the back-off weight.
GRAMS = {
    ("</s>",): (-1.1, 0.0), ("<s>",): (-99.0, -0.35), ("<unk>",): (-1.7, 0.0), ("a",): (-0.5, -0.25),
    ("b",): (-0.7, -0.15), ("c",): (-0.9, -0.45), ("<s>", "a"): (-0.2, -0.05), ("a", "b"): (-0.3, -0.55),
    ("b", "c"): (-0.45, 0.0), ("b", "</s>"): (-0.4, 0.0), ("<s>", "a", "b"): (-0.1, 0.0), ("a", "b", "c"): (-0.6, 0.0),
}  # fmt: skip


def arpa() -> str:
    text = "\\data\\\n" + "".join(f"ngram {n}={sum(len(g) == n for g in GRAMS)}\n" for n in (1, 2, 3))
    for n in (1, 2, 3):
        text += f"\n\\{n}-grams:\n"
        for gram, (p, backoff) in GRAMS.items():
            if len(gram) == n:
                text += f"{p}\t{' '.join(gram)}" + (f"\t{backoff}" if n < 3 and gram != ("</s>",) else "") + "\n"
    return text + "\n\\end\\\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory, kenlm) -> NGram:
    path = tmp_path_factory.mktemp("ngram") / "3.arpa"
    path.write_text(arpa())
    return NGram(path)


@given(words=st.lists(st.sampled_from(["a", "b", "c", "zz"]), max_size=8))
def test_scores_are_natural_logarithms_of_the_backoff_model(model, words):
    known = [w if w != "zz" else "<unk>" for w in words]
    text = ["<s>", *known, "</s>"]
    expected = [log10_prob(GRAMS, tuple(text[max(0, i - 2) : i]), text[i]) for i in range(1, len(text))]
    tokens, oov = model.score("  ".join(words))
    # kenlm keeps fp32: 6e-8 relative, of sums of at most three numbers below 2.
    assert tokens == pytest.approx(math.log(10) * np.array(expected), abs=1e-5)
    assert oov == words.count("zz")


def test_lists(model):
    (scores,) = model.score_nbest([["a b", "", "a b", "zz c"]])
    assert scores.words.tolist() == [2, 0, 2, 2] and scores.oov.tolist() == [0, 0, 0, 1]
    assert scores.logprobs[0] == scores.logprobs[2] == pytest.approx(model.score("a b")[0].sum())
    assert [len(t) for t in scores.token_logprobs] == [3, 1, 3, 3]


def test_words_are_those_of_python(model):
    # A no-break space separates words in str.split(), which counts them everywhere else.
    assert len(model.score("a\u00a0b")[0]) == 3


def test_order_and_description(model):
    assert model.order == 3 and model.describe() == {"path": model.path, "order": 3}


def test_bad_files(kenlm, tmp_path, capfd):
    path = tmp_path / "x.arpa"
    with pytest.raises(LowbitError, match=r"x\.arpa: not a model that kenlm can read: .*No such file"):
        NGram(path)
    path.write_text("no model\n")
    with pytest.raises(LowbitError, match="not a model that kenlm can read"):
        NGram(path)
    path.write_text(arpa()[:-60])
    with pytest.raises(LowbitError, match="not a model that kenlm can read"):
        NGram(path)
    assert capfd.readouterr().err == ""


def test_kenlm_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    with pytest.raises(LowbitError, match=r"pip install lowbit\[ngram\]"):
        NGram(tmp_path / "x.arpa")
