from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
