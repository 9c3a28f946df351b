"""Hostile and damaged packed files: only ever a one-line FormatError, and no memory for what a file merely claims."""

from __future__ import annotations

import copy
import json
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.config import ModelConfig
from lowbit.container import read_packed, write_packed
from lowbit.container_checks import checksum, seal
from lowbit.errors import FormatError

SMALL = ModelConfig(vocab_size=7, d_model=12, n_layers=1, n_heads=2, d_ffn=68, max_len=4, position="learned")
LENGTH = struct.Struct("<Q")


class Forge:
    """A packed file taken apart, to be put together with a lie in it and every checksum right."""

    def __init__(self, data: bytes):
        (length,) = LENGTH.unpack(data[:8])
        header = json.loads(data[8 : 8 + length])
        self.metadata = json.loads(header.pop("__metadata__")["lowbit"])
        self.metadata.pop("checksum")
        self.tensors = {
            name: [t["dtype"], t["shape"], bytearray(data[8 + length :][slice(*t["data_offsets"])])]
            for name, t in header.items()
        }
        # A tensor that the attacks move needs another in front of it.
        self.tensors["embed.scale"] = self.tensors.pop("embed.scale")
        self.tensors["vocab"] = self.tensors.pop("vocab")

    def header(self) -> dict:
        """The header of the tensors as they are now; their checksums enter the metadata."""
        entries, end = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
            if isinstance(self.metadata.get("xxh3"), dict) and name in self.metadata["xxh3"]:
                self.metadata["xxh3"][name] = checksum(data)
        return {"__metadata__": {"lowbit": seal(self.metadata)}, **entries}

    def build(self, header: dict | bytes | None = None) -> bytes:
        raw = header if isinstance(header, bytes) else json.dumps(header or self.header()).encode()
        return LENGTH.pack(len(raw)) + raw + b"".join(bytes(data) for _, _, data in self.tensors.values())


@pytest.fixture(scope="module")
def good(tmp_path_factory, pack_random) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.lowbit"
    write_packed(path, pack_random(SMALL))
    return path.read_bytes()


@pytest.fixture
def forge(good) -> Forge:
    return Forge(good)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("bad") / "m.lowbit"


def reject(target, data: bytes, reason: str | None = None) -> str:
    target.write_bytes(data)
    with pytest.raises(FormatError, match=reason) as error:
        read_packed(target)
    message = str(error.value)
    assert message.startswith(f"{target}: ") and "\n" not in message and len(message) < 1000
    return message


def test_a_forged_file_without_a_lie_is_accepted(forge, target):
    target.write_bytes(forge.build())
    read_packed(target)


def test_truncation(good, target):
    (length,) = LENGTH.unpack(good[:8])
    entries = json.loads(good[8 : 8 + length])
    cuts = {0, 1, 7, 8, 9, 8 + length // 2, 7 + length, 8 + length, 9 + length, len(good) - 1}
    for name, entry in entries.items():
        if name != "__metadata__":
            cuts |= {8 + length + o + d for o in entry["data_offsets"] for d in (-1, 0, 1)}
    cuts |= set(random.Random(0).choices(range(len(good)), k=200))
    for cut in sorted(c for c in cuts if c < len(good)):
        reject(target, good[:cut])


def test_bytes_behind_the_end(good, target):
    for extra in (b"\0", b" " * 8, good):
        reject(target, good + extra)


def test_flipped_bits(good, target):
    """Bits of the header length, the header and the payload."""
    (length,) = LENGTH.unpack(good[:8])
    rng = random.Random(1)
    header, payload = range(8, 8 + length), range(8 + length, len(good))
    for position in (*range(8), *rng.sample(header, 1000), *rng.choices(payload, k=400)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        reject(target, bytes(damaged))


@pytest.mark.parametrize("lie", [0, 1, 2, 2**16, 2**24, 2**31, 2**32, 2**63, 2**64 - 1])
def test_header_length_lies(good, target, lie):
    reject(target, LENGTH.pack(lie) + good[8:])


def test_header_length_slightly_off(good, target):
    (length,) = LENGTH.unpack(good[:8])
    for delta in (*range(-9, 0), *range(1, 10)):
        reject(target, LENGTH.pack(length + delta) + good[8:])
    reject(target, LENGTH.pack(len(good) - 8) + good[8:])


HEADERS = {
    "empty": b"",
    "spaces": b" " * 100,
    "array": b"[]",
    "string": b'"x"',
    "no tensors": b"{}",
    "NaN": b'{"a": NaN}',
    "huge integer": b'{"a": ' + b"9" * 100_000 + b"}",
    "huge float": b'{"a": 1e999999}',
    "deep arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many brackets": b'{"a":[' + b"[]," * 300_000 + b"[]]}",
    "duplicate key": b'{"a": 1, "a": 2}',
    "duplicate metadata": b'{"__metadata__": {}, "__metadata__": {}}',
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "lone surrogate": b'{"\\ud800": 1}',
    "nul": b'{"a\x00": 1}',
    "leading space": b" {}",
    "two objects": b"{}{}",
    "metadata list": b'{"__metadata__": []}',
    "metadata number": b'{"__metadata__": {"lowbit": 1}}',
    "metadata text": b'{"__metadata__": {"lowbit": "x"}}',
    "metadata surrogate": b'{"__metadata__": {"lowbit": "\\ud800"}}',
    "another tool's": b'{"__metadata__": {"format": "pt"}}',
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_header_text(forge, target, raw):
    reject(target, forge.build(raw))


def test_other_safetensors_files_are_told_apart(forge, target):
    reject(target, forge.build(HEADERS["another tool's"]), "not a packed model")


def _entry(**changes):
    return lambda header: header["embed.scale"].update(changes)


def _shift(by):
    """Moves a tensor that has another before and behind it."""

    def change(header):
        entry = header["embed.scale"]
        entry["data_offsets"] = [o + by for o in entry["data_offsets"]]

    return change


ENTRIES = {
    "dtype of another width": (_entry(dtype="F32"), "embed.scale"),
    "dtype of the same width": (_entry(dtype="BF16"), "embed.scale"),
    "dtype in lower case": (_entry(dtype="f16"), "embed.scale"),
    "dtype null": (_entry(dtype=None), "embed.scale"),
    "dtype list": (_entry(dtype=["F16"]), "embed.scale"),
    "bytes instead of fp16": (_entry(dtype="U8", shape=[7, 2]), "embed.scale.*asks for F16"),
    "shape transposed": (_entry(shape=[1, 7]), "embed.scale.*asks for"),
    "shape flat": (_entry(shape=[7]), "embed.scale.*asks for"),
    "shape too large": (_entry(shape=[2**40, 2**40]), "embed.scale"),
    "shape that overflows": (_entry(shape=[2**62 + 7, 4]), "embed.scale"),
    "shape negative": (_entry(shape=[-7, -1]), "embed.scale"),
    "shape boolean": (_entry(shape=[7, True]), "embed.scale"),
    "shape float": (_entry(shape=[7.0, 1]), "embed.scale"),
    "shape of 1,000 ones": (_entry(shape=[7] + [1] * 1000), "embed.scale"),
    "shape object": (_entry(shape={}), "embed.scale"),
    "offsets shifted": (_shift(1), "leaves a hole"),
    "offsets overlap": (_shift(-2), "overlaps"),
    "offsets reversed": (_entry(data_offsets=[14, 0]), "embed.scale"),
    "offsets past the end": (_shift(2**20), "leaves a hole"),
    "offsets overflow": (_entry(data_offsets=[2**64 - 7, 2**64 + 7]), "leaves a hole"),
    "offsets negative": (_entry(data_offsets=[-14, 0]), "embed.scale"),
    "offsets three": (_entry(data_offsets=[0, 14, 28]), "embed.scale"),
    "offsets one": (_entry(data_offsets=[0]), "embed.scale"),
    "offsets text": (_entry(data_offsets="01"), "embed.scale"),
    "field more": (_entry(stride=1), "embed.scale"),
    "entry null": (lambda h: h.update({"embed.scale": None}), "embed.scale"),
    "field less": (lambda h: h["embed.scale"].pop("dtype"), "embed.scale"),
    "tensor missing": (lambda h: h.pop("embed.scale"), "'embed.scale' is missing"),
    "tensor renamed": (lambda h: h.update({"x\n" * 9999: h.pop("embed.scale")}), "'embed.scale' is missing"),
    "tensor more": (lambda h: h.update({"x" * 9999: h["embed.scale"]}), "does not belong"),
    "metadata more": (lambda h: h["__metadata__"].update(other="x"), "metadata"),
    "metadata missing": (lambda h: h.pop("__metadata__"), "not a packed model"),
    "metadata object": (lambda h: h["__metadata__"].update(lowbit={}), "metadata"),
}


@pytest.mark.parametrize(("change", "reason"), ENTRIES.values(), ids=ENTRIES)
def test_tensor_entries(forge, target, change, reason):
    header = forge.header()
    change(header)
    reject(target, forge.build(header), reason)


def test_two_tensors_in_one_place(forge, target):
    header = forge.header()
    header["layers.0.norm1.weight"]["data_offsets"] = header["layers.0.norm1.bias"]["data_offsets"]
    reject(target, forge.build(header), "layers.0.norm1")


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
    "vocabulary hash null": (lambda m: m.update(vocab_sha256=None), "vocab_sha256"),
}


@pytest.mark.parametrize(("change", "reason"), METADATA.values(), ids=METADATA)
def test_metadata(forge, target, change, reason):
    change(forge.metadata)
    reject(target, forge.build(), reason)


def test_edited_metadata_without_its_checksum(forge, target):
    header = forge.header()
    text = header["__metadata__"]["lowbit"]
    header["__metadata__"]["lowbit"] = text.replace('"test"', '"jest"')
    reject(target, forge.build(header), "does not match its checksum")


def test_a_wrong_tensor_checksum_names_the_tensor(forge, target):
    header = forge.header()
    forge.tensors["layers.0.attn.q.scale"][2][0] ^= 1
    reject(target, forge.build(header), "'layers.0.attn.q.scale': checksum mismatch")


def _half(value: float) -> bytes:
    return struct.pack("<e", value)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("inf"), float("nan")])
def test_scales(forge, target, value):
    forge.tensors["layers.0.attn.k.scale"][2][2:4] = _half(value)
    reject(target, forge.build(), "'layers.0.attn.k.scale': a scale is not finite and positive")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_vectors(forge, target, value):
    forge.tensors["layers.0.norm1.weight"][2][2:4] = _half(value)
    reject(target, forge.build(), "'layers.0.norm1.weight': a value is NaN or infinite")


# The fixture's matrices (12 columns): embed binary (4 pad bits), attn.q ternary (2 of 5 digits used in the last byte),
# attn.v midrise4 (no padding), attn.o int8.
@pytest.mark.parametrize(
    ("name", "byte", "value", "reason"),
    [
        ("embed.codes", 1, 0b0001_0000, "pad bits"),
        ("embed.codes", 1, 0b1000_0000, "pad bits"),
        ("layers.0.attn.q.codes", 0, 243, "byte 243 does not hold five ternary codes"),
        ("layers.0.attn.q.codes", 1, 255, "byte 255 does not hold five ternary codes"),
        ("layers.0.attn.q.codes", 2, 9, "pad codes"),
        ("layers.0.attn.o.codes", 5, 0, "code 0 lies outside table 'int8'"),
    ],
)
def test_codes(forge, target, name, byte, value, reason):
    forge.tensors[name][2][byte] = value
    reject(target, forge.build(), f"'{name}': {reason}")


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
        (b"", "1 words"),
        (b"\n" * 100_000, "100001 words"),
    ],
)
def test_vocabulary(forge, target, text, reason):
    forge.tensors["vocab"] = ["U8", [len(text)], bytearray(text)]
    reject(target, forge.build(), f"tensor 'vocab'.*{reason}")


def test_claims_allocate_nothing(forge, target):
    """Metadata that describes terabytes, in a file of kilobytes: the peak stays near what parsing the file takes."""
    forge.metadata["config"].update(vocab_size=2**24, d_model=65536, n_heads=1, n_layers=1, d_ffn=2**20, max_len=2**20)
    data = forge.build()
    tracemalloc.start()
    reject(target, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(data) + 2**20


CHUNKS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "delete"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)
    ),
    min_size=1,
    max_size=5,
)


@given(edits=CHUNKS)
@settings(max_examples=400)
def test_random_edits(good, target, edits):
    data = bytearray(good)
    for kind, where, chunk in edits:
        at = int(where * (len(data) - 1))
        if kind == "flip":
            data[at] ^= chunk[0] or 1
        else:
            data[at : at + (0 if kind == "insert" else len(chunk))] = b"" if kind == "delete" else chunk
    if bytes(data) != good:
        reject(target, bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(value=JSON, path=st.lists(st.floats(0, 1), min_size=1, max_size=4), sealed=st.booleans())
@settings(max_examples=400)
def test_any_json_in_any_place(good, target, value, path, sealed):
    """Replace one value anywhere in the header, or in the metadata with its checksum put right."""
    forge = Forge(good)
    tree = forge.metadata if sealed else forge.header()
    before, at = copy.deepcopy(tree), tree
    for step, choice in enumerate(path):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[int(choice * (len(keys) - 1))]
        if step == len(path) - 1 or not isinstance(at[key], dict | list) or not at[key]:
            at[key] = value
            break
        at = at[key]
    target.write_bytes(forge.build() if sealed else forge.build(tree))
    try:
        read_packed(target)
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        # Whatever was accepted says the same thing, except in provenance, which may hold any object.
        allowed = {"made_by", "fp32_nbytes"}
        assert {k: v for k, v in tree.items() if k not in allowed} == {
            k: v for k, v in before.items() if k not in allowed
        }


@given(st.binary(max_size=64))
@settings(max_examples=200)
def test_random_bytes(target, data):
    reject(target, data)
    reject(target, LENGTH.pack(len(data)) + data)
    reject(target, LENGTH.pack(len(data) + 2) + b"{" + data + b"}")
