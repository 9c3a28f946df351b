"""Damaged and hostile packed files, their bytes and headers: only ever a one-line FormatError."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.container import read_packed
from lowbit.errors import FormatError

LENGTH = struct.Struct("<Q")


def test_truncation(good, reject):
    (length,) = LENGTH.unpack(good[:8])
    entries = json.loads(good[8 : 8 + length])
    cuts = {0, 1, 7, 8, 9, 8 + length // 2, 7 + length, 8 + length, 9 + length, len(good) - 1}
    for name, entry in entries.items():
        if name != "__metadata__":
            cuts |= {8 + length + o + d for o in entry["data_offsets"] for d in (-1, 0, 1)}
    cuts |= set(random.Random(0).choices(range(len(good)), k=200))
    for cut in sorted(c for c in cuts if c < len(good)):
        reject(good[:cut])


def test_bytes_behind_the_end(good, reject):
    for extra in (b"\0", b" " * 8, good):
        reject(good + extra)


def test_flipped_bits(good, reject):
    """Bits of the header length, the header and the payload."""
    (length,) = LENGTH.unpack(good[:8])
    rng = random.Random(1)
    header, payload = range(8, 8 + length), range(8 + length, len(good))
    for position in (*range(8), *rng.sample(header, 1000), *rng.choices(payload, k=400)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        reject(bytes(damaged))


@pytest.mark.parametrize("lie", [0, 1, 2, 2**16, 2**24, 2**31, 2**32, 2**63, 2**64 - 1])
def test_header_length_lies(good, reject, lie):
    reject(LENGTH.pack(lie) + good[8:])


def test_header_length_slightly_off(good, reject):
    (length,) = LENGTH.unpack(good[:8])
    for delta in (*range(-9, 0), *range(1, 10)):
        reject(LENGTH.pack(length + delta) + good[8:])
    reject(LENGTH.pack(len(good) - 8) + good[8:])


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
def test_header_text(forge, reject, raw):
    reject(forge.build(raw))


def test_other_safetensors_files_are_told_apart(forge, reject):
    reject(forge.build(HEADERS["another tool's"]), "not a packed model")


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
def test_tensor_entries(forge, reject, change, reason):
    header = forge.header()
    change(header)
    reject(forge.build(header), reason)


def test_two_tensors_in_one_place(forge, reject):
    header = forge.header()
    header["layers.0.norm1.weight"]["data_offsets"] = header["layers.0.norm1.bias"]["data_offsets"]
    reject(forge.build(header), "layers.0.norm1")


CHUNKS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "delete"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)
    ),
    min_size=1,
    max_size=5,
)


@given(edits=CHUNKS)
@settings(max_examples=400)
def test_random_edits(good, reject, edits):
    data = bytearray(good)
    for kind, where, chunk in edits:
        at = int(where * (len(data) - 1))
        if kind == "flip":
            data[at] ^= chunk[0] or 1
        else:
            data[at : at + (0 if kind == "insert" else len(chunk))] = b"" if kind == "delete" else chunk
    if bytes(data) != good:
        reject(bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(value=JSON, path=st.lists(st.floats(0, 1), min_size=1, max_size=4), sealed=st.booleans())
@settings(max_examples=400)
def test_any_json_in_any_place(forge, packed_path, value, path, sealed):
    """Replace one value anywhere in the header, or in the metadata with its checksum put right."""
    forge = copy.deepcopy(forge)
    tree = forge.metadata if sealed else forge.header()
    before, at = copy.deepcopy(tree), tree
    for step, choice in enumerate(path):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[int(choice * (len(keys) - 1))]
        if step == len(path) - 1 or not isinstance(at[key], dict | list) or not at[key]:
            at[key] = value
            break
        at = at[key]
    packed_path.write_bytes(forge.build() if sealed else forge.build(tree))
    try:
        read_packed(packed_path)
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
def test_random_bytes(reject, data):
    reject(data)
    reject(LENGTH.pack(len(data)) + data)
    reject(LENGTH.pack(len(data) + 2) + b"{" + data + b"}")
