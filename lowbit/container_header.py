"""The header of a packed file: what the file claims, checked against its own model configuration.

No claim is believed before it is checked: sizes are compared with the bytes that are there, so that nothing
is allocated for what a file merely says (docs/FORMAT.md lists the checks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from lowbit import bitpack
from lowbit.config import ModelConfig
from lowbit.container_checks import load_json, shorten, unseal
from lowbit.errors import FormatError, LowbitError
from lowbit.tables import FREE, Table, find_table, free_table

FORMAT_VERSION = 1
METADATA_KEY = "lowbit"
VOCAB = "vocab"
_ITEM_BYTES = {"U8": 1, "F16": 2}
_MAX_HEADER = 2**24  # bytes; a model of 1,024 layers, the most ModelConfig allows, needs about a third of it
_MAX_POSITION_VALUES = 2**26  # of a computed position table, the one thing a model allocates beside its tensors
_MAX_WORD_BYTES = 256  # mean length of a word: bounds what the compressed vocabulary may unpack to
_MAX_BRACKETS = 2**18  # opening brackets in the header: bounds the objects that parsing may create
_FIELD_TYPES = {
    "version": int, "config": dict, "vocab_sha256": str, "vocab_nbytes": int, "matrices": dict, "xxh3": dict,
    "fp32_nbytes": int, "made_by": dict,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``begin`` and ``end`` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class MatrixHeader:
    """A quantized matrix as the header describes it; ``group == shape[1]`` is one scale a row."""

    table: Table
    group: int
    shape: tuple[int, int]  # (N, K)

    @property
    def bits(self) -> int:
        return self.table.bits

    @property
    def codes_shape(self) -> tuple[int, int]:
        n, k = self.shape
        ternary = self.table.name == "ternary"
        return n, bitpack.ternary_row_bytes(k) if ternary else bitpack.row_bytes(k, self.bits)

    @property
    def scale_shape(self) -> tuple[int, int]:
        return self.shape[0], -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Payload bytes: packed codes and fp16 scales."""
        return math.prod(self.codes_shape) + 2 * math.prod(self.scale_shape)


@dataclass(frozen=True)
class Header:
    """A packed file without its payload, every claim of it checked against the model configuration.

    Attributes:
        vocab_nbytes: the words joined by newlines, before compression.
        entries: place of every tensor; checksums: xxh3_64 of its bytes, 16 hexadecimal digits.
        fp32_nbytes: size of the fp32 checkpoint that the file stands for; file_nbytes: of this file.
        made_by: provenance, as the packer wrote it.
    """

    config: ModelConfig
    vocab_sha256: str
    vocab_nbytes: int
    matrices: dict[str, MatrixHeader]
    entries: dict[str, TensorEntry]
    checksums: dict[str, str]
    fp32_nbytes: int
    file_nbytes: int
    made_by: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Compression: bytes(fp32 checkpoint) / bytes(this file)."""
        return self.fp32_nbytes / self.file_nbytes

    @property
    def mean_bits(self) -> float:
        """Bits of code per quantized weight (ternary counts 1.6), scales not included."""
        weights = [math.prod(m.shape) for m in self.matrices.values()]
        bits = [m.table.effective_bits for m in self.matrices.values()]
        return sum(w * b for w, b in zip(weights, bits)) / sum(weights)


def parse_header(stream: BinaryIO, file_nbytes: int) -> Header:
    """Read and check everything in front of the payload.

    Raises:
        FormatError: anything that :func:`lowbit.container.write_packed` would not have written.
    """
    raw = _header_bytes(stream, file_nbytes)
    try:
        header = load_json(raw.decode(), "header")
    except UnicodeDecodeError:
        raise FormatError("the header is not UTF-8 text") from None
    metadata = _metadata(header.get("__metadata__"))  # first: another tool's file is named as such
    entries = _entries(header, payload=8 + len(raw))
    try:
        config = ModelConfig.from_dict(metadata["config"])
    except LowbitError as error:
        raise FormatError(shorten(str(error))) from None
    if config.position == "sinusoidal" and config.max_len * config.d_model > _MAX_POSITION_VALUES:
        raise FormatError(f"model config: positions of {config.max_len} x {config.d_model} values are too many")
    shapes = config.matrix_shapes()
    _same_names(shapes, metadata["matrices"], "matrix")
    matrices = {m: _matrix_header(m, metadata["matrices"][m], shape) for m, shape in shapes.items()}
    _check_entries(entries, expected_tensors(config, matrices))
    _check_layout(entries, 8 + len(raw), file_nbytes)
    _same_names(entries, metadata["xxh3"], "checksum of tensor")
    if metadata["fp32_nbytes"] < 4 * config.n_parameters():
        raise FormatError(f"fp32_nbytes {metadata['fp32_nbytes']} is less than the fp32 parameters take")
    check_vocab_nbytes(metadata["vocab_nbytes"], config.vocab_size)
    return Header(
        config=config,
        vocab_sha256=metadata["vocab_sha256"],
        vocab_nbytes=metadata["vocab_nbytes"],
        matrices=matrices,
        entries=entries,
        checksums=metadata["xxh3"],
        fp32_nbytes=metadata["fp32_nbytes"],
        file_nbytes=file_nbytes,
        made_by=metadata["made_by"],
    )


def expected_tensors(
    config: ModelConfig, matrices: Mapping[str, MatrixHeader]
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Tensor name -> (dtype, shape) of a packed file; the compressed vocabulary has any length (None)."""
    tensors: dict[str, tuple[str, tuple[int, ...] | None]] = {VOCAB: ("U8", None)}
    for name, matrix in matrices.items():
        tensors[f"{name}.codes"] = ("U8", matrix.codes_shape)
        tensors[f"{name}.scale"] = ("F16", matrix.scale_shape)
    return tensors | {name: ("F16", shape) for name, shape in config.vector_shapes().items()}


def check_vocab_nbytes(nbytes: int, words: int) -> None:
    """Raises FormatError unless ``words`` words can be ``nbytes`` bytes, newlines between them included."""
    if not 2 * words - 1 <= nbytes <= _MAX_WORD_BYTES * words:
        raise FormatError(
            f"vocab_nbytes {nbytes}: {words} words take {2 * words - 1} to {_MAX_WORD_BYTES * words} bytes"
        )


def _header_bytes(stream: BinaryIO, file_nbytes: int) -> bytes:
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise FormatError(f"{file_nbytes} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(_MAX_HEADER, file_nbytes - 8):
        reason = f"the header claims {length} bytes, the file has {file_nbytes}"
        raise FormatError(f"not a packed model, or truncated: {reason}")
    raw = stream.read(length)
    if len(raw) < length or not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise FormatError("the header is not a JSON object")
    if raw.count(b"{") + raw.count(b"[") > _MAX_BRACKETS:
        raise FormatError("the header describes more tensors than any model has")
    return raw


def _entries(header: dict[str, Any], payload: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        where = f"tensor {shorten(repr(name))}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{where}: needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise FormatError(f"{where}: dtype {shorten(repr(dtype))} is none of {', '.join(_ITEM_BYTES)}")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise FormatError(f"{where}: shape and data_offsets must be lists of integers from 0")
        begin, end = offsets
        if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise FormatError(f"{where}: {end - begin} bytes do not hold {dtype} {shorten(str(shape))}")
        entries[name] = TensorEntry(dtype, tuple(shape), payload + begin, payload + end)
    return entries


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 4 and all(type(v) is int and v >= 0 for v in value)


def _metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or METADATA_KEY not in value:
        raise FormatError(f"not a packed model: a safetensors file without {METADATA_KEY!r} metadata")
    text = value[METADATA_KEY]
    if len(value) != 1 or not isinstance(text, str):
        raise FormatError(f"the metadata must be the one text {METADATA_KEY!r}")
    metadata = unseal(text)
    version = metadata.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(f"format version {shorten(repr(version))}, this lowbit reads {FORMAT_VERSION}")
    _same_names(_FIELD_TYPES, metadata, "metadata field")
    for field, kind in _FIELD_TYPES.items():
        if type(metadata[field]) is not kind:
            raise FormatError(f"metadata field {field!r} must be of type {kind.__name__}")
    return metadata


def _same_names(expected: Any, found: Any, what: str) -> None:
    if missing := [name for name in expected if name not in found]:
        raise FormatError(f"{what} {missing[0]!r} is missing")
    if unknown := [name for name in found if name not in expected]:
        raise FormatError(f"{what} {shorten(repr(unknown[0]))} does not belong to this model")


def _matrix_header(name: str, value: Any, shape: tuple[int, int]) -> MatrixHeader:
    required, allowed = {"bits", "table"}, {"bits", "table", "group", "levels"}
    if not isinstance(value, dict) or not required <= set(value) <= allowed:
        raise FormatError(f"matrix {name!r}: needs bits and table, takes group and levels")
    bits, table_name = value["bits"], value["table"]
    try:
        free = table_name == FREE
        table = free_table(value.get("levels"), bits) if free else find_table(bits, table_name)
    except LowbitError as error:
        raise FormatError(f"matrix {name!r}: {shorten(str(error))}") from None
    if table.name != table_name or ("levels" in value) != free:
        raise FormatError(f"matrix {name!r}: exactly a free table has levels, and its name is in full")
    group = value.get("group", shape[1])
    if "group" in value and (type(group) is not int or group % 64 or not 0 < group < shape[1]):
        found = shorten(repr(group))
        raise FormatError(f"matrix {name!r}: group {found} is no multiple of 64 below {shape[1]}")
    return MatrixHeader(table, group, shape)


def _check_entries(entries: dict[str, TensorEntry], expected: dict[str, tuple[str, tuple[int, ...] | None]]) -> None:
    _same_names(expected, entries, "tensor")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        right = entry.shape == shape if shape else len(entry.shape) == 1
        if entry.dtype != dtype or not right:
            found, wanted = f"{entry.dtype} {list(entry.shape)}", f"{dtype} {list(shape or ['length'])}"
            raise FormatError(f"tensor {name!r}: {found}, the configuration asks for {wanted}")


def _check_layout(entries: dict[str, TensorEntry], payload: int, file_nbytes: int) -> None:
    """The tensors must fill the file from ``payload`` to its end, one after the other."""
    position, previous = payload, "header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            how = "overlaps" if entry.begin < position else "leaves a hole after"
            raise FormatError(f"tensor {name!r}: {how} {previous!r}")
        if entry.end > file_nbytes:
            raise FormatError(f"tensor {name!r}: ends at byte {entry.end} of {file_nbytes}: truncated")
        position, previous = entry.end, name
    if position != file_nbytes:
        raise FormatError(f"{file_nbytes - position} bytes follow the last tensor")
