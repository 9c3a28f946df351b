"""Well-formed packed files, every checksum right, whose metadata or values are wrong."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import pytest

from lowbit.container import read_packed


def test_a_forged_file_without_a_lie_is_accepted(forge, packed_path):
    packed_path.write_bytes(forge.build())
    read_packed(packed_path)


def _config(**changes):
    return lambda m: m["config"].update(changes)


def _matrix(**changes):
    return lambda m: m["matrices"]["layers.0.mlp.fc2"].update(changes)


METADATA = {
    "version of the future": (lambda m: m.update(version=2), "format version 2, this lowbit reads 1"),
    "version text": (lambda m: m.update(version="1"), "format version"),
    "version true": (lambda m: m.update(version=True), "format version"),
    "version missing": (lambda m: m.pop("version"), "format version None"),
    "config list": (lambda m: m.update(config=[]), "config"),
    "config field more": (_config(width=3), "unknown field 'width'"),
    "config field less": (lambda m: m["config"].pop("tied"), "'tied' is missing"),
    "a billion layers": (_config(n_layers=10**9), "n_layers"),
    "a thousand layers": (_config(n_layers=1024), "is missing"),
    "a huge vocabulary": (_config(vocab_size=2**24), "'embed.codes'"),
    "a huge width": (_config(d_model=65536, n_heads=1), "embed"),
    "a huge FFN": (_config(d_ffn=2**20), "mlp.fc1.codes"),
    "huge positions": (_config(max_len=2**20), "'pos.weight'"),
    "huge computed positions": (_config(position="sinusoidal", max_len=2**20, d_model=2048), "positions of 1048576"),
    "untied": (_config(tied=False), "'head' is missing"),
    "norm_eps infinite": (_config(norm_eps=1e308), "norm_eps"),
    "matrix missing": (lambda m: m["matrices"].pop("embed"), "matrix 'embed' is missing"),
    "matrix unknown": (lambda m: m["matrices"].update(x={}), "matrix 'x' does not belong"),
    "matrix null": (lambda m: m["matrices"].update(embed=None), "matrix 'embed'"),
    "bits of another width": (_matrix(bits=3), "'layers.0.mlp.fc2'.*bits must be"),
    "bits that do not fit": (_matrix(bits=2), "'layers.0.mlp.fc2'"),
    "bits true": (lambda m: m["matrices"]["embed"].update(bits=True), "matrix 'embed'.*bits must be"),
    "bits float": (_matrix(bits=4.0), "'layers.0.mlp.fc2'.*bits must be"),
    "table unknown": (_matrix(table="nf4"), "unknown table 'nf4'"),
    "table alias": (_matrix(table="pow2"), "name is in full"),
    "table list": (_matrix(table=[]), "unknown table"),
    "free without levels": (_matrix(table="free"), "'layers.0.mlp.fc2'.*integer levels"),
    "levels too few": (_matrix(table="free", levels=[1, 2]), "16 levels"),
    "levels not ascending": (_matrix(table="free", levels=[0] * 16), "ascend"),
    "levels beyond int8": (_matrix(table="free", levels=list(range(120, 136))), "int8"),
    "levels of text": (_matrix(table="free", levels="abcdefghijklmnop"), "integer levels"),
    "levels of a named table": (_matrix(levels=list(range(16))), "exactly a free table"),
    "group ragged": (_matrix(group=63), "group 63"),
    "group huge": (_matrix(group=2**40), "group"),
    "group zero": (_matrix(group=0), "group 0"),
    "group negative": (_matrix(group=-64), "group -64"),
    "group smaller than the scales": (_matrix(group=64), "mlp.fc2.scale"),
    "field more": (lambda m: m.update(x=1), "'x' does not belong"),
    "field less": (lambda m: m.pop("made_by"), "'made_by' is missing"),
    "provenance list": (lambda m: m.update(made_by=[]), "'made_by'"),
    "checksum missing": (lambda m: m["xxh3"].pop("embed.codes"), "checksum of tensor 'embed.codes' is missing"),
    "checksum more": (lambda m: m["xxh3"].update(x="0"), "checksum of tensor 'x'"),
    "checksums null": (lambda m: m.update(xxh3=None), "'xxh3'"),
    "fp32 bytes too few": (lambda m: m.update(fp32_nbytes=1), "fp32_nbytes"),
    "fp32 bytes text": (lambda m: m.update(fp32_nbytes="1"), "fp32_nbytes"),
    "vocabulary hash of another": (lambda m: m.update(vocab_sha256="0" * 64), "tensor 'vocab'.*hash"),
    "vocabulary length true": (lambda m: m.update(vocab_nbytes=True), "'vocab_nbytes' must be of type int"),
    "vocabulary hash null": (lambda m: m.update(vocab_sha256=None), "vocab_sha256"),
}


@pytest.mark.parametrize(("change", "reason"), METADATA.values(), ids=METADATA)
def test_metadata(forge, reject, change, reason):
    change(forge.metadata)
    reject(forge.build(), reason)


def test_edited_metadata_without_its_checksum(forge, reject):
    header = forge.header()
    text = header["__metadata__"]["lowbit"]
    header["__metadata__"]["lowbit"] = text.replace('"test"', '"jest"')
    reject(forge.build(header), "does not match its checksum")


def test_a_wrong_tensor_checksum_names_the_tensor(forge, reject):
    header = forge.header()
    forge.tensors["layers.0.attn.q.scale"][2][0] ^= 1
    reject(forge.build(header), "'layers.0.attn.q.scale': checksum mismatch")


def _half(value: float) -> bytes:
    return struct.pack("<e", value)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("inf"), float("nan")])
def test_scales(forge, reject, value):
    forge.tensors["layers.0.attn.k.scale"][2][2:4] = _half(value)
    reject(forge.build(), "'layers.0.attn.k.scale': a scale is not finite and positive")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_vectors(forge, reject, value):
    forge.tensors["layers.0.norm1.weight"][2][2:4] = _half(value)
    reject(forge.build(), "'layers.0.norm1.weight': a value is NaN or infinite")


# The fixture's matrices (12 columns): embed binary (4 pad bits), attn.q ternary (2 of 5 digits used in the last byte),
# attn.o int8, mlp.fc2 pow2_4 (code 15 unused).
@pytest.mark.parametrize(
    ("name", "byte", "value", "reason"),
    [
        ("embed.codes", 1, 0b0001_0000, "pad bits"),
        ("embed.codes", 1, 0b1000_0000, "pad bits"),
        ("layers.0.attn.q.codes", 0, 243, "byte 243 does not hold five ternary codes"),
        ("layers.0.attn.q.codes", 1, 255, "byte 255 does not hold five ternary codes"),
        ("layers.0.attn.q.codes", 2, 9, "pad codes"),
        ("layers.0.attn.o.codes", 5, 0, "code 0 lies outside table 'int8'"),
        ("layers.0.mlp.fc2.codes", 3, 0xF0, "code 15 lies outside table 'pow2_4'"),
    ],
)
def test_codes(forge, reject, name, byte, value, reason):
    forge.tensors[name][2][byte] = value
    reject(forge.build(), f"'{name}': {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"</s>\n<unk>\na\nb\nc\nd", "6 words, the configuration has 7"),
        (b"</s>\n<unk>\na\nb\nc\nd\nd", "'d' twice"),
        (b"<unk>\n</s>\na\nb\nc\nd\ne", "starts with"),
        (b"</s>\n<unk>\na\nb\nc\nd\n", "not one word"),
        (b"</s>\n<unk>\na\nb\nc\nd\n\xff", "not UTF-8"),
        (b"</s>\n<unk>\na\nb\nc\nd\n\xed\xa0\x80", "not UTF-8"),
        (b"</s>\n<unk>\na\nb\nc\nd\nanother", "hash"),
        (b"\n" * 1000, "1001 words"),
    ],
)
def test_vocabulary(forge, reject, text, reason):
    set_vocab(forge, zlib.compress(text), len(text))
    reject(forge.build(), f"tensor 'vocab'.*{reason}")


def set_vocab(forge, stream: bytes, nbytes: int) -> None:
    forge.tensors["vocab"] = ["U8", [len(stream)], bytearray(stream)]
    forge.metadata["vocab_nbytes"] = nbytes


WORDS = b"</s>\n<unk>\na\nb\nc\nd\ne"


@pytest.mark.parametrize(
    ("stream", "nbytes", "reason"),
    [
        (WORDS, len(WORDS), "not a zlib stream"),
        (b"", len(WORDS), "not one zlib stream"),
        (zlib.compress(WORDS)[:-1], len(WORDS), "not one zlib stream"),
        (zlib.compress(WORDS)[:-1] + b"\0", len(WORDS), "not a zlib stream"),
        (zlib.compress(WORDS) + b"more", len(WORDS), "not one zlib stream"),
        (zlib.compress(WORDS) * 2, len(WORDS), "not one zlib stream"),
        (zlib.compress(WORDS), len(WORDS) - 1, "not one zlib stream of the 19 bytes"),
        (zlib.compress(WORDS), len(WORDS) + 1, "not one zlib stream of the 21 bytes"),
    ],
)
def test_vocabulary_stream(forge, reject, stream, nbytes, reason):
    set_vocab(forge, stream, nbytes)
    reject(forge.build(), f"tensor 'vocab'.*{reason}")


@pytest.mark.parametrize("nbytes", [-1, 0, 12, 7 * 256 + 1, 2**62])
def test_vocabulary_length(forge, reject, nbytes):
    set_vocab(forge, zlib.compress(WORDS), nbytes)
    reject(forge.build(), f"vocab_nbytes {nbytes}: 7 words take 13 to 1792 bytes")


def test_a_decompression_bomb_stays_packed(forge, reject):
    """64 MiB of newlines in 64 KiB: unpacked no further than the words may be."""
    set_vocab(forge, zlib.compress(b"\n" * 2**26), 7 * 256)
    data = forge.build()
    tracemalloc.start()
    reject(data, "tensor 'vocab': not one zlib stream of the 1792 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(data) + 2**20


def test_claims_allocate_nothing(forge, reject):
    """Metadata that describes terabytes, in a file of kilobytes: the peak stays near what parsing the file takes."""
    forge.metadata["config"].update(vocab_size=2**24, d_model=65536, n_heads=1, n_layers=1, d_ffn=2**20, max_len=2**20)
    data = forge.build()
    tracemalloc.start()
    reject(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(data) + 2**20
