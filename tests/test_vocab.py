from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import ops
from lowbit.errors import LowbitError
from lowbit.vocab import EOS, EOS_ID, UNK, UNK_ID, Vocab


def test_special_ids():
    vocab = Vocab.build(["b a a </s> <unk>"])
    assert vocab.tokens == [EOS, UNK, "a", "b"]
    assert (vocab.id(EOS), vocab.id(UNK), vocab.id("zzz")) == (EOS_ID, UNK_ID, UNK_ID)
    assert "a" in vocab and "zzz" not in vocab and len(vocab) == 4


def test_build_counts_and_limits():
    lines = ["a a a b b c d"]
    assert Vocab.build(lines, min_count=2).tokens[2:] == ["a", "b"]
    assert Vocab.build(lines, max_size=3).tokens[2:] == ["a"]
    assert Vocab.build(lines, max_size=2).tokens[2:] == []
    assert Vocab.build(["z y x"]).tokens[2:] == ["x", "y", "z"]  # ties by spelling: the same in every run
    with pytest.raises(LowbitError, match="max_size"):
        Vocab.build(lines, max_size=1)


def test_encode_counts_unknown_words_but_not_a_literal_unk():
    vocab = Vocab.build(["a b"])
    assert vocab.encode("a x <unk> b") == ([2, 1, 1, 3], 1)
    assert vocab.encode("") == ([], 0)


# White space of ASCII and beyond, what only looks like it, letters of all kinds, a lone surrogate.
odd_text = st.text(st.sampled_from("ab é字\t\n\x0b\x1c\x1f\x00\x7f\x85\xa0\u2003\u200b\u3000\U0001f600\ud800"))


@given(st.lists(odd_text | st.text(st.characters()), max_size=8))
def test_many_texts_at_once_as_one_by_one(texts):
    vocab = Vocab([EOS, UNK, "a", "ab", "é", "字", "b\u200b"])
    ids, ends, unknown = ops.word_index(vocab.tokens, UNK_ID).encode(texts)
    expected = [vocab.encode(text) for text in texts]
    assert ids.tolist() == [i for row, _ in expected for i in row]
    assert (ends.tolist(), unknown.tolist()) == (
        [sum(len(row) for row, _ in expected[: i + 1]) for i in range(len(texts))], [n for _, n in expected],
    )  # fmt: skip


def test_texts_are_strings():
    with pytest.raises(TypeError, match="text 1 is no string but <class 'bytes'>"):
        ops.word_index([EOS, UNK], UNK_ID).encode(["a", b"b"])


@given(st.lists(st.text(min_size=1, max_size=6).filter(lambda w: w.split() == [w]), min_size=1, unique=True))
def test_round_trip_and_hash(words):
    words = [w for w in words if w not in (EOS, UNK)]
    vocab = Vocab([EOS, UNK, *words])
    line = " ".join(words)
    assert vocab.decode(vocab.encode(line)[0]) == line
    assert vocab.hash == hashlib.sha256("\n".join(vocab.tokens).encode()).hexdigest()


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([UNK, EOS], "starts with"),
        ([], "starts with"),
        ([EOS, UNK, "a", "a"], "'a' twice"),
        ([EOS, UNK, "a b"], "not one word"),
        ([EOS, UNK, ""], "not one word"),
        ([EOS, UNK, "a\n"], "not one word"),
        ([EOS, UNK, "\ud800"], "not one word"),
    ],
)
def test_refuses(tokens, reason):
    with pytest.raises(LowbitError, match=reason):
        Vocab(tokens)
