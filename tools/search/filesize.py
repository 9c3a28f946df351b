"""The exact size of a packed file before it exists: its header is built, its data are only counted (docs/FORMAT.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.container_checks import compress_vocab, seal
from lowbit.container_header import (
    FORMAT_VERSION,
    METADATA_KEY,
    VOCAB,
    MatrixHeader,
    expected_tensors,
)
from lowbit.errors import LowbitError
from lowbit.plan import MatrixPlan, Plan
from lowbit.tables import FREE, find_table
from lowbit.tools.provenance import PROVENANCE_BYTES

_ITEM_BYTES = {"U8": 1, "F16": 2}
_HASH, _SHA = "0" * 16, "0" * 64


@dataclass(frozen=True)
class FileSize:
    """What decides the size of a packed file beside its plan.

    Attributes:
        vocab_nbytes: the words joined by newlines; vocab_packed: the same, compressed.
        fp32_nbytes: size of the fp32 checkpoint, the numerator of the ratio.
    """

    config: ModelConfig
    vocab_nbytes: int
    vocab_packed: int
    fp32_nbytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FileSize:
        words = "\n".join(checkpoint.vocab.tokens)
        return cls(checkpoint.config, len(words.encode()), len(compress_vocab(words)), checkpoint.fp32_nbytes)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> FileSize:
        """Validating inverse of :meth:`to_dict`; ``where`` heads every error."""
        sizes = ("vocab_nbytes", "vocab_packed", "fp32_nbytes")
        if not isinstance(values, dict) or set(values) != {"config", *sizes}:
            raise LowbitError(f"{where}: 'file' needs exactly config, {', '.join(sizes)}")
        if bad := [name for name in sizes if type(values[name]) is not int or values[name] < 1]:
            raise LowbitError(f"{where}: {bad[0]} must be a positive integer, not {values[bad[0]]!r}")
        try:
            return cls(ModelConfig.from_dict(values["config"]), *(values[name] for name in sizes))
        except LowbitError as error:
            raise LowbitError(f"{where}: {error}") from None

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the file that `lowbit pack` writes for ``plan``, provenance of up to ``PROVENANCE_BYTES`` included.

        Raises:
            LowbitError: a matrix has free levels, whose digits are not known before they are learned.
        """
        header, payload = self._parts(plan)
        return 8 + header + -header % 8 + payload

    def additive(self, matrix: str, entry: MatrixPlan) -> int:
        """The bytes of ``nbytes`` that this matrix brings, whatever the others: data, shapes and description.

        What is left depends on the plan only by the digits of the offsets and by padding to 8 bytes: see
        :meth:`least_rest`.
        """
        header = self._matrix_header(matrix, entry)
        shapes = json.dumps([header.codes_shape, header.scale_shape], separators=(",", ":"))
        described = json.dumps(json.dumps(_describe(header), separators=(",", ":")))
        return header.nbytes + len(shapes) + len(described)

    def least_rest(self, smallest: Plan) -> int:
        """A lower bound of ``nbytes(plan) - sum(additive)`` over all plans, where ``smallest`` has the least payload
        in every matrix: no offset of another plan has fewer digits."""
        header, payload = self._parts(smallest)
        return 8 + header + payload - sum(self.additive(name, entry) for name, entry in smallest.items())

    def _matrix_header(self, matrix: str, entry: MatrixPlan) -> MatrixHeader:
        if entry.table == FREE:
            raise LowbitError(f"matrix {matrix!r}: the size of a file with free levels is not known before packing")
        n, k = self.config.matrix_shapes()[matrix]
        return MatrixHeader(find_table(entry.bits, entry.table), min(entry.group or k, k), (n, k))

    def _parts(self, plan: Plan) -> tuple[int, int]:
        """(bytes of the header's text before padding, bytes of all data)."""
        headers = {name: self._matrix_header(name, plan[name]) for name in self.config.matrix_shapes()}
        tensors = expected_tensors(self.config, headers)
        entries, offset = {}, 0
        # safetensors lays tensors out by dtype, widest first, then by name.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: (-_ITEM_BYTES[t[1][0]], t[0])):
            shape = (self.vocab_packed,) if name == VOCAB else shape
            end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        header = {"__metadata__": {METADATA_KEY: seal(self._metadata(headers, entries))}, **entries}
        # Provenance stands as {} in the metadata built here.
        return len(json.dumps(header, separators=(",", ":"))) + PROVENANCE_BYTES - 2, offset

    def _metadata(self, headers: Mapping[str, MatrixHeader], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of :func:`lowbit.container.write_packed`, with hashes of the right length."""
        return {
            "version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "vocab_sha256": _SHA,
            "vocab_nbytes": self.vocab_nbytes,
            "matrices": {name: _describe(header) for name, header in headers.items()},
            "xxh3": dict.fromkeys(tensors, _HASH),
            "fp32_nbytes": self.fp32_nbytes,
            "made_by": {},
        }


def _describe(header: MatrixHeader) -> dict[str, Any]:
    described: dict[str, Any] = {"bits": header.bits, "table": header.table.name}
    return described if header.group == header.shape[1] else described | {"group": header.group}
