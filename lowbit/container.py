"""The packed file of a low-bit model (`.lowbit`): DESIGN section 4, docs/FORMAT.md.

One safetensors file. A quantized matrix ``m`` is ``m.codes`` uint8 [N, row bytes] and ``m.scale`` fp16
[N, G]; biases, norms and learned positions are fp16; the vocabulary is a zlib stream. What the numbers mean,
checksums and provenance are JSON under the metadata key ``lowbit``.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from lowbit.config import ModelConfig
from lowbit.container_checks import (
    check_codes,
    check_scale,
    check_vector,
    checksum,
    compress_vocab,
    decompress_vocab,
    seal,
    shorten,
)
from lowbit.container_header import (
    FORMAT_VERSION,
    METADATA_KEY,
    VOCAB,
    Header,
    MatrixHeader,
    TensorEntry,
    check_vocab_nbytes,
    expected_tensors,
    parse_header,
)
from lowbit.errors import FormatError, LowbitError
from lowbit.files import PathLike, atomic_path
from lowbit.quantize import QuantTensor
from lowbit.tables import FREE, Table
from lowbit.vocab import Vocab

__all__ = [
    "Header",
    "PackedFile",
    "PackedMatrix",
    "PackedModel",
    "read_header",
    "read_packed",
    "write_packed",
]


@dataclass(eq=False)
class PackedMatrix:
    """A quantized matrix in the canonical layout, as it lies in the file.

    Attributes:
        codes_packed: uint8 [N, row bytes]: ``bitpack.pack_codes``, or ``pack_ternary`` for the ternary table.
        scale: fp16 [N, G], finite and positive.
        group: weights that share a scale along K; K itself for one scale a row.
        shape: (N, K).
    """

    codes_packed: torch.Tensor
    scale: torch.Tensor
    table: Table
    group: int
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        return self.table.bits

    @property
    def header(self) -> MatrixHeader:
        return MatrixHeader(self.table, self.group, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file: codes and scales."""
        return self.codes_packed.numel() + 2 * self.scale.numel()

    def to_quant_tensor(self) -> QuantTensor:
        """Expand to one code a byte; lossless."""
        return QuantTensor.unpack(self.codes_packed, self.scale, self.table, self.shape[1], self.group)

    @classmethod
    def from_quant_tensor(cls, q: QuantTensor) -> PackedMatrix:
        return cls(q.pack(), q.scale, q.levels, min(q.group, q.shape[1]), q.shape)


@dataclass(eq=False)
class PackedModel:
    """A packed file in memory.

    Attributes:
        matrices: matrix name -> packed matrix, in the order of the forward pass. A loader may pop each one as
            it re-lays it, so that only one copy of the model is ever held.
        vectors: name -> fp32 tensor (biases, norms, learned positions); the file holds them as fp16.
        fp32_nbytes: file size of the fp32 checkpoint that this model stands for.
        info: provenance, JSON.
    """

    config: ModelConfig
    vocab: Vocab
    matrices: dict[str, PackedMatrix]
    vectors: dict[str, torch.Tensor]
    fp32_nbytes: int
    info: dict[str, Any] = field(default_factory=dict)


def write_packed(path: PathLike, model: PackedModel) -> None:
    """Write atomically; the same model gives the same bytes.

    Raises:
        LowbitError: a tensor that does not fit the configuration, is not finite (in fp16), or codes outside
            their table; nothing is written.
    """
    tensors = _tensors(model)
    _check_writable(model, tensors)
    metadata = {
        "version": FORMAT_VERSION,
        "config": model.config.to_dict(),
        "vocab_sha256": model.vocab.hash,
        "vocab_nbytes": len(_words(model.vocab).encode()),
        "matrices": {name: _describe(matrix) for name, matrix in model.matrices.items()},
        "xxh3": {name: checksum(array) for name, array in tensors.items()},
        "fp32_nbytes": model.fp32_nbytes,
        "made_by": model.info,
    }
    try:
        text = seal(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise LowbitError(f"{path}: provenance is not JSON: {error}") from None
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, {METADATA_KEY: text}))
        read_header(temporary)


def read_packed(path: PathLike) -> PackedModel:
    """Read and check a whole packed file.

    Raises:
        LowbitError: the file cannot be read.
        FormatError: it is damaged, edited or no packed model; the message names the tensor and the reason.
    """
    with PackedFile(path) as file:
        header = file.header
        return PackedModel(
            config=header.config,
            vocab=file.vocab(),
            matrices={name: file.matrix(name) for name in header.matrices},
            vectors={name: file.vector(name) for name in header.config.vector_shapes()},
            fp32_nbytes=header.fp32_nbytes,
            info=header.made_by,
        )


def read_header(path: PathLike) -> Header:
    """Read and check the header alone; the payload is not read. Raises as :func:`read_packed`."""
    with PackedFile(path) as file:
        return file.header


class PackedFile:
    """An open packed file whose header is checked; the payload is read, and checked, tensor by tensor.

    Plain reads, no memory map: a file that shrinks under us is then an error and not a bus error.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise LowbitError(f"{path}: cannot read: not a regular file")
            self._stream = open(self.path, "rb")  # noqa: SIM115 (closed by __exit__)
        except (OSError, ValueError) as error:
            if isinstance(error, LowbitError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise LowbitError(f"{path}: cannot read: {reason}") from None
        try:
            with self._naming():
                self.header = parse_header(self._stream, self._stream.seek(0, 2) - self._stream.seek(0))
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def vocab(self) -> Vocab:
        """The vocabulary inside."""
        with self._naming():
            data = decompress_vocab(VOCAB, self._bytes(VOCAB).tobytes(), self.header.vocab_nbytes)
            size = self.header.config.vocab_size
            if data.count(b"\n") + 1 != size:
                words = data.count(b"\n") + 1
                raise FormatError(f"tensor {VOCAB!r}: {words} words, the configuration has {size}")
            try:
                vocab = Vocab(data.decode().split("\n"))
            except UnicodeDecodeError:
                raise FormatError(f"tensor {VOCAB!r}: not UTF-8 text") from None
            except LowbitError as error:
                raise FormatError(f"tensor {VOCAB!r}: {shorten(str(error))}") from None
            if vocab.hash != self.header.vocab_sha256:
                raise FormatError(f"tensor {VOCAB!r}: the vocabulary does not have the hash in the metadata")
            return vocab

    def matrix(self, name: str) -> PackedMatrix:
        """A matrix of ``header.matrices``."""
        with self._naming():
            info = self.header.matrices[name]
            codes = torch.from_numpy(self._bytes(f"{name}.codes")).view(info.codes_shape)
            scale = self._fp16(f"{name}.scale")
            check_codes(f"{name}.codes", codes, info.table, info.shape[1])
            check_scale(f"{name}.scale", scale)
            return PackedMatrix(codes, scale, info.table, info.group, info.shape)

    def vector(self, name: str) -> torch.Tensor:
        """A bias, norm or position tensor, fp32."""
        with self._naming():
            vector = self._fp16(name)
            check_vector(name, vector)
            return vector.float()

    def matrices(self) -> Iterator[tuple[str, PackedMatrix]]:
        """Every matrix in turn, for a loader that re-lays and releases them one by one."""
        for name in self.header.matrices:
            yield name, self.matrix(name)

    def _fp16(self, name: str) -> torch.Tensor:
        data = self._bytes(name).view("<f2").astype(np.float16, copy=False)
        return torch.from_numpy(data).view(self.header.entries[name].shape)

    def _bytes(self, name: str) -> np.ndarray:
        """The payload of a tensor, uint8 [nbytes], its checksum verified."""
        entry: TensorEntry = self.header.entries[name]
        data = np.empty(entry.nbytes, np.uint8)
        try:
            self._stream.seek(entry.begin)
            read = self._stream.readinto(data)
        except OSError as error:
            raise LowbitError(f"cannot read: {error.strerror}") from None
        if read != entry.nbytes:
            raise FormatError(f"tensor {name!r}: the file ends inside it: truncated")
        if checksum(data) != self.header.checksums[name]:
            raise FormatError(f"tensor {name!r}: checksum mismatch: the file is damaged or was edited")
        return data

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Put the file's name in front of every error."""
        try:
            yield
        except LowbitError as error:
            raise type(error)(f"{self.path}: {error}") from None


def _describe(matrix: PackedMatrix) -> dict[str, Any]:
    described: dict[str, Any] = {"bits": matrix.bits, "table": matrix.table.name}
    if matrix.group != matrix.shape[1]:
        described["group"] = matrix.group
    if matrix.table.name == FREE:
        described["levels"] = list(matrix.table.levels)
    return described


def _words(vocab: Vocab) -> str:
    return "\n".join(vocab.tokens)


def _tensors(model: PackedModel) -> dict[str, np.ndarray]:
    """Everything that becomes a tensor of the file, by its name there."""
    tensors = {VOCAB: torch.frombuffer(bytearray(compress_vocab(_words(model.vocab))), dtype=torch.uint8)}
    for name, matrix in model.matrices.items():
        tensors |= {f"{name}.codes": matrix.codes_packed, f"{name}.scale": matrix.scale}
    # fp16: they are a percent or two of the file, and rounding them is far below what the codes cost
    # (docs/FORMAT.md has the measurement).
    tensors |= {name: vector.half() for name, vector in model.vectors.items()}
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def _check_writable(model: PackedModel, arrays: dict[str, np.ndarray]) -> None:
    """The reader's checks, so that nothing is written that cannot be read."""
    config = model.config
    if len(model.vocab) != config.vocab_size:
        raise LowbitError(f"{len(model.vocab)} words of vocabulary, the model has {config.vocab_size}")
    check_vocab_nbytes(len(_words(model.vocab).encode()), config.vocab_size)
    if model.fp32_nbytes < 4 * config.n_parameters():
        raise LowbitError(f"fp32_nbytes {model.fp32_nbytes} is less than the model's fp32 parameters take")
    for name, shape in config.matrix_shapes().items():
        matrix = model.matrices.get(name)
        if matrix is None or tuple(matrix.shape) != shape:
            found = "missing" if matrix is None else list(matrix.shape)
            raise LowbitError(f"matrix {name!r} is {found}, the configuration asks for {list(shape)}")
    names = {"U8": "uint8", "F16": "float16"}
    expected = expected_tensors(config, {name: m.header for name, m in model.matrices.items()})
    for name, (dtype, shape) in expected.items():
        array = arrays.get(name)
        if array is None or array.dtype != names[dtype] or (shape and array.shape != shape):
            found = "missing" if array is None else f"{list(array.shape)} {array.dtype}"
            wanted = f"{list(shape or [])} {names[dtype]}"
            raise LowbitError(f"tensor {name!r} is {found}, the configuration asks for {wanted}")
    if unknown := [name for name in arrays if name not in expected]:
        raise LowbitError(f"tensor {unknown[0]!r} does not belong to this configuration")
    for name, matrix in model.matrices.items():
        check_codes(f"{name}.codes", matrix.codes_packed, matrix.table, matrix.shape[1])
        check_scale(f"{name}.scale", matrix.scale)
    for name in config.vector_shapes():
        if not np.isfinite(arrays[name]).all():
            largest = float(model.vectors[name].abs().max())
            raise LowbitError(f"tensor {name!r}: magnitude {largest:g} does not fit in fp16 (65504)")
