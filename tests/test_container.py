"""The packed file: lossless, deterministic, readable by other tools; test_container_attacks.py has hostile files."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib

import pytest
import torch
from safetensors import safe_open

from lowbit.bitpack import unpack_ternary
from lowbit.config import ModelConfig
from lowbit.container import PackedFile, PackedMatrix, read_header, read_packed, write_packed
from lowbit.errors import FormatError, LowbitError
from lowbit.plan import MatrixPlan
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

VARIANTS = [
    {"position": "learned", "tied": False},
    {"norm": "post", "activation": "relu", "position": "sinusoidal"},
    {"d_model": 64, "d_ffn": 8, "n_layers": 1, "n_heads": 1},
]


@pytest.fixture
def path(tmp_path, packed_model):
    write_packed(tmp_path / "m.lowbit", packed_model)
    return tmp_path / "m.lowbit"


@pytest.mark.parametrize("changes", VARIANTS)
def test_round_trip(tmp_path, small_config, pack_random, changes):
    model = pack_random(dataclasses.replace(small_config, **changes))
    write_packed(tmp_path / "m.lowbit", model)
    back = read_packed(tmp_path / "m.lowbit")
    assert back.config == model.config and back.vocab.tokens == model.vocab.tokens
    assert back.info == model.info and back.fp32_nbytes == model.fp32_nbytes
    assert list(back.matrices) == list(model.config.matrix_shapes())
    for name, matrix in model.matrices.items():
        other = back.matrices[name]
        assert torch.equal(other.codes_packed, matrix.codes_packed) and torch.equal(other.scale, matrix.scale)
        assert (other.table, other.group, other.shape) == (matrix.table, matrix.group, matrix.shape)
        assert torch.equal(other.to_quant_tensor().dequantize(), matrix.to_quant_tensor().dequantize())
    for name, vector in model.vectors.items():
        assert back.vectors[name].dtype == torch.float32 and torch.equal(back.vectors[name], vector)


def test_same_model_same_bytes(tmp_path, path, small_config, pack_random):
    write_packed(tmp_path / "again.lowbit", pack_random(small_config))
    assert (tmp_path / "again.lowbit").read_bytes() == path.read_bytes()


def test_any_safetensors_reader_can_read_it(path, packed_model):
    with safe_open(str(path), "pt") as file:
        assert list(file.metadata()) == ["lowbit"]
        name = next(n for n, m in packed_model.matrices.items() if m.table.name == "ternary")
        codes = unpack_ternary(file.get_tensor(f"{name}.codes"), packed_model.matrices[name].shape[1])
        assert torch.equal(codes, packed_model.matrices[name].to_quant_tensor().codes)
        assert (
            zlib.decompress(bytes(file.get_tensor("vocab").tolist())).decode().split("\n") == packed_model.vocab.tokens
        )


def test_every_byte_is_accounted_for(path, packed_model):
    header = read_header(path)
    assert header.file_nbytes == os.path.getsize(path)
    assert header.ratio == packed_model.fp32_nbytes / os.path.getsize(path)
    first = min(e.begin for e in header.entries.values())
    assert first + sum(e.nbytes for e in header.entries.values()) == header.file_nbytes
    for name, matrix in header.matrices.items():
        group = None if matrix.group == matrix.shape[1] else matrix.group
        plan = MatrixPlan(matrix.bits, matrix.table.name, group)
        assert matrix.nbytes == plan.nbytes(*matrix.shape) == packed_model.matrices[name].nbytes


def test_mean_bits_weigh_matrices_by_size(tmp_path, pack_random):
    config = ModelConfig(vocab_size=5, d_model=10, n_layers=1, n_heads=1, d_ffn=20)
    model = pack_random(config)
    for name, (n, k) in config.matrix_shapes().items():
        bits, table = (8, None) if name == "embed" else (2, "ternary")
        model.matrices[name] = PackedMatrix.from_quant_tensor(quantize(torch.randn(n, k), bits, table))
    write_packed(tmp_path / "m.lowbit", model)
    weights = sum(math.prod(s) for s in config.matrix_shapes().values())
    assert read_header(tmp_path / "m.lowbit").mean_bits == pytest.approx((50 * 8 + (weights - 50) * 1.6) / weights)


def test_ternary_takes_a_fifth_of_a_byte_a_weight(packed_model):
    matrix = next(m for m in packed_model.matrices.values() if m.table.name == "ternary")
    assert matrix.codes_packed.shape == (matrix.shape[0], -(-matrix.shape[1] // 5))


def test_header_alone_does_not_read_the_payload(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    read_header(path)
    with pytest.raises(FormatError, match="checksum mismatch"):
        read_packed(path)


def test_matrices_come_one_by_one(path, packed_model):
    with PackedFile(path) as file:
        for name, matrix in file.matrices():
            assert torch.equal(matrix.codes_packed, packed_model.matrices.pop(name).codes_packed)
    assert not packed_model.matrices


def test_reading_a_file_that_shrinks(path):
    with PackedFile(path) as file:
        os.truncate(path, os.path.getsize(path) // 2)
        with pytest.raises(FormatError, match="truncated"):
            for name in file.header.matrices:
                file.matrix(name)


def test_unreadable_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "none", tmp_path, tmp_path / "pipe", "nul\0byte"):
        with pytest.raises(LowbitError, match="cannot read"):
            read_packed(bad)


def test_file_mode_is_that_of_any_new_file(path, tmp_path):
    (tmp_path / "plain").write_text("")
    assert os.stat(path).st_mode == os.stat(tmp_path / "plain").st_mode


def _spoil(model, how):
    """One defect a writer must refuse."""
    name = next(iter(model.matrices))
    matrix, vector = model.matrices[name], next(iter(model.vectors))
    if how == "scale":
        matrix.scale[0, 0] = 0
    elif how == "scale dtype":
        matrix.scale = matrix.scale.float()
    elif how == "scale shape":
        matrix.scale = matrix.scale.repeat(1, 2)
    elif how == "pad bits":
        matrix.codes_packed[0, -1] = 255
    elif how == "matrix missing":
        del model.matrices[name]
    elif how == "matrix shape":
        matrix.shape = (matrix.shape[0] + 1, matrix.shape[1])
    elif how == "matrix unknown":
        model.matrices["layers.7.attn.q"] = matrix
    elif how == "vector missing":
        del model.vectors[vector]
    elif how == "vector shape":
        model.vectors[vector] = model.vectors[vector][:1]
    elif how == "vector overflow":
        model.vectors[vector][0] = 1e6
    elif how == "vector nan":
        model.vectors[vector][0] = math.nan
    elif how == "vocabulary":
        model.vocab = Vocab(model.vocab.tokens[:-1])
    elif how == "long words":
        model.vocab = Vocab([*model.vocab.tokens[:-1], "x" * 3000])
    elif how == "fp32 bytes":
        model.fp32_nbytes = 10
    elif how == "provenance":
        model.info = {"x": object()}
    elif how == "provenance nan":
        model.info = {"x": math.nan}
    return name, vector


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scale", "'{m}.scale': a scale is not finite and positive"),
        ("scale dtype", "'{m}.scale' is .* float32, the configuration asks for .* float16"),
        ("scale shape", "'{m}.scale' is"),
        ("pad bits", "'{m}.codes': pad bits"),
        ("matrix missing", "matrix '{m}' is missing"),
        ("matrix shape", "matrix '{m}' is"),
        ("matrix unknown", "'layers.7.attn.q.codes' does not belong|'layers.7.attn.q'"),
        ("vector missing", "'{v}' is missing"),
        ("vector shape", "'{v}' is"),
        ("vector overflow", "'{v}': magnitude 1e.06 does not fit in fp16"),
        ("vector nan", "'{v}'"),
        ("long words", "vocab_nbytes .*: 11 words take 21 to 2816 bytes"),
        ("vocabulary", "10 words of vocabulary, the model has 11"),
        ("fp32 bytes", "fp32_nbytes 10"),
        ("provenance", "provenance is not JSON"),
        ("provenance nan", "provenance is not JSON"),
    ],
)
def test_writer_refuses_and_leaves_nothing_behind(tmp_path, packed_model, how, reason):
    name, vector = _spoil(packed_model, how)
    with pytest.raises(LowbitError, match=reason.format(m=name, v=vector)):
        write_packed(tmp_path / "m.lowbit", packed_model)
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(path, packed_model):
    before = path.read_bytes()
    packed_model.matrices["embed"].scale[0, 0] = math.inf
    with pytest.raises(LowbitError):
        write_packed(path, packed_model)
    assert path.read_bytes() == before
