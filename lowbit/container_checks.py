"""Checks of a packed file's bytes: JSON text, codes, scales, vectors, checksums (docs/FORMAT.md lists them).

Everything here works on untrusted bytes: it allocates no more than a small multiple of what the file really
holds, and its only exception is a FormatError that names the tensor and the reason.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
import xxhash

from lowbit import bitpack
from lowbit.errors import FormatError
from lowbit.tables import Table

_CHECKSUM_HEAD = '{"checksum":"'


def check_codes(name: str, packed: torch.Tensor, table: Table, k: int) -> None:
    """Raises FormatError unless packed codes uint8 [N, bytes] have zero padding and lie in ``table``."""
    if table.name == "ternary":
        # Five base-3 digits end at 242; a last byte that holds only k % 5 of them ends earlier.
        if int(packed.max()) >= 3**5:
            raise FormatError(f"tensor {name!r}: byte {int(packed.max())} does not hold five ternary codes")
        if k % 5 and int(packed[:, -1].max()) >= 3 ** (k % 5):
            raise FormatError(f"tensor {name!r}: pad codes at the end of a row are not zero")
        return
    if not bitpack.pad_bits_are_zero(packed, table.bits, k):
        raise FormatError(f"tensor {name!r}: pad bits at the end of a row are not zero")
    if len(table.levels) < 2**table.bits:
        largest = int(bitpack.unpack_codes(packed, table.bits, k).max())
        if largest >= len(table.levels):
            raise FormatError(f"tensor {name!r}: code {largest} lies outside table {table.name!r}")
    if table.name == "int8" and not bool(packed.all()):
        raise FormatError(f"tensor {name!r}: code 0 lies outside table 'int8' (levels -127 to 127)")


def check_scale(name: str, scale: torch.Tensor) -> None:
    """Raises FormatError unless every scale is finite and positive."""
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError(f"tensor {name!r}: a scale is not finite and positive")


def check_vector(name: str, vector: torch.Tensor) -> None:
    """Raises FormatError unless every element is finite."""
    if not bool(torch.isfinite(vector).all()):
        raise FormatError(f"tensor {name!r}: a value is NaN or infinite")


def compress_vocab(words: str) -> bytes:
    """zlib stream of the words joined by newlines."""
    return zlib.compress(words.encode(), 9)


def decompress_vocab(name: str, data: bytes, nbytes: int) -> bytes:
    """Inverse of :func:`compress_vocab`; makes no more than ``nbytes`` + 1 bytes, whatever the stream holds.

    Raises:
        FormatError: no zlib stream, or not exactly one of ``nbytes`` bytes.
    """
    stream = zlib.decompressobj()
    try:
        words = stream.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"tensor {name!r}: not a zlib stream: {error}") from None
    if len(words) != nbytes or not stream.eof or stream.unused_data:
        raise FormatError(f"tensor {name!r}: not one zlib stream of the {nbytes} bytes that vocab_nbytes says")
    return words


def checksum(data: Any) -> str:
    """xxh3_64 of a bytes-like object, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(metadata: dict[str, Any]) -> str:
    """Metadata as JSON text that begins with the checksum of everything behind it."""
    text = json.dumps(metadata, allow_nan=False, separators=(",", ":"))
    return f'{_CHECKSUM_HEAD}{checksum(text[1:].encode())}",{text[1:]}'


def unseal(text: str) -> dict[str, Any]:
    """Inverse of :func:`seal`.

    Raises:
        FormatError: the text is not sealed, was changed, or is no JSON object.
    """
    start = len(_CHECKSUM_HEAD)
    found, body = text[start : start + 16], text[start + 18 :]
    sealed = text.startswith(_CHECKSUM_HEAD) and text[start + 16 : start + 18] == '",'
    if not sealed or found != checksum(body.encode("utf-8", "surrogatepass")):
        raise FormatError("the metadata does not match its checksum: the file is damaged or was edited")
    return load_json("{" + body, "metadata")


def shorten(text: str, limit: int = 300) -> str:
    """One line of bounded length, for messages that quote a hostile file."""
    return text if len(text) <= limit else f"{text[:limit]} ..."


def load_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, huge integers or deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise FormatError(f"the {what} has a duplicate key")
        return result

    def integer(digits: str) -> int:
        if len(digits) > 40:  # conversion takes quadratic time; sizes are checked by those who know the tensor
            raise FormatError(f"the {what} has an integer of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> None:
        raise FormatError(f"the {what} has the value {name}")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"the {what} is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"the {what} is not JSON: {shorten(str(error))}") from None
    if not isinstance(value, dict):
        raise FormatError(f"the {what} is not a JSON object")
    return value
