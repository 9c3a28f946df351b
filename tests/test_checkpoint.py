"""Checkpoints: lossless, sized as fp32, and every damage a one-line FormatError."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.checkpoint import METADATA_KEY, Checkpoint
from lowbit.config import ModelConfig
from lowbit.container import read_header, write_packed
from lowbit.errors import FormatError, LowbitError
from lowbit.model import TransformerLM
from lowbit.plan import Plan
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=6, d_model=16, n_layers=1, n_heads=2, d_ffn=24, max_len=8)
VOCAB = Vocab(["</s>", "<unk>", "a", "b", "c", "ä"])


@pytest.fixture
def plain() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint.of_model(TransformerLM(CONFIG), VOCAB, info={"stage": "train"})


@pytest.fixture
def admm(plain) -> Checkpoint:
    plain.plan, plain.residual = Plan.uniform(CONFIG, 2), 0.0
    for name in CONFIG.matrix_shapes():
        q = quantize(plain.tensors[f"{name}.weight"], 2)
        plain.tensors[f"{name}.weight"], plain.scales[name] = q.dequantize(), q.scale
    return plain


@pytest.mark.parametrize("kind", ["plain", "admm"])
def test_round_trip(tmp_path, request, kind):
    checkpoint = request.getfixturevalue(kind)
    checkpoint.save(tmp_path / "c")
    back = Checkpoint.load(tmp_path / "c")
    assert back.config == CONFIG and back.vocab.tokens == VOCAB.tokens and back.info == {"stage": "train"}
    assert (dict(back.plan) if back.plan else None) == (dict(checkpoint.plan) if checkpoint.plan else None)
    assert back.residual == checkpoint.residual
    for mine, theirs in ((checkpoint.tensors, back.tensors), (checkpoint.scales, back.scales)):
        assert set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    tokens = torch.tensor([[0, 2, 5]])
    assert torch.equal(back.build_model()(tokens), checkpoint.build_model()(tokens))


def test_fp32_nbytes_is_the_size_of_the_plain_file(plain, admm, tmp_path):
    """Within what a file adds: provenance, fields that are null, and safetensors' padding to 8 bytes."""
    bare = Checkpoint(CONFIG, VOCAB, plain.tensors)
    bare.save(tmp_path / "c")
    assert 0 <= os.path.getsize(tmp_path / "c") - bare.fp32_nbytes < 80
    assert admm.fp32_nbytes == bare.fp32_nbytes


def spoil(path, change) -> None:
    """Rewrite the file with ``change(tensors, metadata)``, which may return text to stand for the metadata."""
    with safe_open(str(path), "pt") as stream:
        metadata = json.loads(stream.metadata()[METADATA_KEY])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    text = change(tensors, metadata)
    save_file(tensors, path, {METADATA_KEY: text if isinstance(text, str) else json.dumps(metadata)})


LIES = {
    "version": (lambda t, m: m.update(version=2), "checkpoint version 2"),
    "not an object": (lambda t, m: "[1]", "damaged metadata"),
    "not JSON": (lambda t, m: "{", "damaged metadata"),
    "deep": (lambda t, m: "[" * 100_000, "damaged metadata"),
    "no config": (lambda t, m: m.pop("config"), "'config'"),
    "no info": (lambda t, m: m.pop("info"), "'info'"),
    "info list": (lambda t, m: m.update(info=[1]), "info must be an object, not list"),
    "info null": (lambda t, m: m.update(info=None), "info must be an object"),
    "residual text": (lambda t, m: m.update(residual="0"), "residual must be a number from 0"),
    "residual true": (lambda t, m: m.update(residual=True), "residual must be a number from 0"),
    "residual negative": (lambda t, m: m.update(residual=-1.0), "residual must be a number from 0"),
    "words": (lambda t, m: m.update(vocab=m["vocab"][:-1]), "5 words of vocabulary, the model has 6"),
    "words of numbers": (lambda t, m: m.update(vocab=[1, 2]), "vocabulary starts with"),
    "matrix unknown": (lambda t, m: m["plan"]["matrices"].update(x={"bits": 2}), "unknown matrix 'x'"),
    "tensor missing": (lambda t, m: t.pop("norm.bias"), "tensor 'norm.bias' is missing"),
    "tensor more": (lambda t, m: t.update(x=torch.zeros(1)), "'x' does not belong"),
    "tensor shape": (lambda t, m: t.update({"norm.bias": torch.zeros(3)}), r"'norm.bias' is \[3\]"),
    "tensor dtype": (lambda t, m: t.update({"norm.bias": torch.zeros(16).half()}), "'norm.bias' is .*float16"),
    "tensor NaN": (lambda t, m: t["norm.bias"].fill_(torch.nan), "'norm.bias' holds NaN"),
    "scale missing": (lambda t, m: t.pop("embed.scale"), "'embed.scale' is missing"),
    "scale zero": (lambda t, m: t["embed.scale"].zero_(), "'embed.scale' holds a value that is not finite"),
}


@pytest.mark.parametrize("lie", LIES)
def test_damage_is_named(tmp_path, admm, lie):
    change, reason = LIES[lie]
    admm.save(tmp_path / "c")
    spoil(tmp_path / "c", change)
    with pytest.raises(FormatError, match=reason) as error:
        Checkpoint.load(tmp_path / "c")
    assert str(error.value).startswith(f"{tmp_path / 'c'}: ") and "\n" not in str(error.value)


def test_what_is_no_checkpoint(tmp_path, plain, packed_model):
    with pytest.raises(LowbitError, match="no such checkpoint file"):
        Checkpoint.load(tmp_path)
    plain.save(tmp_path / "c")
    os.truncate(tmp_path / "c", os.path.getsize(tmp_path / "c") - 1)
    with pytest.raises(FormatError, match="not a safetensors file"):
        Checkpoint.load(tmp_path / "c")


def test_files_under_the_wrong_name_say_so(tmp_path, plain, packed_model):
    write_packed(tmp_path / "m.lowbit", packed_model)
    shutil.move(tmp_path / "m.lowbit", tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"it is a packed model, whose name ends in \.lowbit"):
        Checkpoint.load(tmp_path / "m.safetensors")
    plain.save(tmp_path / "c.lowbit")
    with pytest.raises(FormatError, match="not a packed model: a safetensors file without 'lowbit' metadata"):
        read_header(tmp_path / "c.lowbit")
