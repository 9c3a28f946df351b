"""From a model file to a model that runs: a full-precision checkpoint or a packed low-bit file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import bitpack, ops
from lowbit.checkpoint import Checkpoint
from lowbit.container import PackedFile, PackedMatrix
from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.layers import QuantEmbedding, QuantLinear
from lowbit.model import TransformerLM
from lowbit.vocab import Vocab

PACKED_SUFFIX = ".lowbit"
_MANY_ROWS = 256  # rows of a matrix product that scores a batch, whose kernel need not be that of one row


@dataclass
class LoadedModel:
    """A model in evaluation mode, its vocabulary, and what runs: what ``lm.describe()`` tells."""

    model: TransformerLM
    vocab: Vocab
    description: dict[str, Any]


def load_model(path: PathLike, device: str = "cpu", compute: str = "int8") -> LoadedModel:
    """Load ``*.lowbit`` onto the packed kernels, anything else as a full-precision checkpoint.

    Raises:
        LowbitError: no such file, an unknown device or ``compute``, or a device that this machine or build lacks:
            nothing ever falls back to something else.
        FormatError: a damaged file.
    """
    if compute not in ops.COMPUTE:
        raise LowbitError(f"compute must be one of {', '.join(ops.COMPUTE)}, not {compute!r}")
    if device not in ("cpu", "cuda"):
        raise LowbitError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise LowbitError("device cuda: PyTorch finds no CUDA GPU here; use device cpu")
    if not Path(path).is_file():
        raise LowbitError(f"{path}: no such model file")
    if str(path).endswith(PACKED_SUFFIX):
        return _load_packed(path, device, compute)
    return _load_checkpoint(path, device)


def _load_checkpoint(path: PathLike, device: str) -> LoadedModel:
    checkpoint = Checkpoint.load(path)
    description = {"kind": "checkpoint", "precision": "fp32", "compute": "fp32", "kernel": "torch"}
    model = checkpoint.build_model().to(device)
    return LoadedModel(model, checkpoint.vocab, description | _common(path, model, device))


def _load_packed(path: PathLike, device: str, compute: str, gpu: bool | None = None) -> LoadedModel:
    """``gpu``: the modules of :mod:`lowbit.gpu_layers`, by default on device cuda; on the CPU they are for tests."""
    gpu = device == "cuda" if gpu is None else gpu
    with PackedFile(path) as file:
        header, vocab = file.header, file.vocab()
        vectors = {name: file.vector(name) for name in header.config.vector_shapes()}
        modules: dict[str, nn.Module] = {}
        kernels = set()
        # One matrix at a time: re-laid for the kernel, then its canonical codes go before the next one is read.
        for name, matrix in file.matrices():
            bias = vectors.pop(f"{name}.bias", None)
            modules[name], names = (_gpu_module if gpu else _cpu_module)(name, matrix, bias, device, compute)
            kernels |= names
            del matrix
    model = TransformerLM(header.config, modules).to(device)
    own = {name: p for name, p in model.named_parameters() if name in vectors}
    with torch.no_grad():
        for name, vector in vectors.items():
            own[name].copy_(vector)
    bits = sorted({m.table.bits for m in header.matrices.values()})
    description = {
        "kind": "packed",
        "precision": "/".join(map(str, bits)) + " bits",
        "compute": "fp16" if gpu else compute,
    }
    description |= {"kernel": ", ".join(sorted(kernels)), "isa": "cuda" if gpu else ops.isa()}
    return LoadedModel(model.eval(), vocab, description | _common(path, model, device))


def _cpu_module(name, matrix: PackedMatrix, bias, device: str, compute: str) -> tuple[nn.Module, set[str]]:
    """A matrix of a file as a module, and the kernels that run for one row and for many."""
    packed = relay(matrix)
    kernels = {packed.kernel_name(rows, compute) for rows in (1, _MANY_ROWS)}
    return (QuantEmbedding(packed, compute) if name == "embed" else QuantLinear(packed, bias, compute)), kernels


def _gpu_module(name, matrix: PackedMatrix, bias, device: str, compute: str) -> tuple[nn.Module, set[str]]:
    """As :func:`_cpu_module`, on the GPU kernels: activations are fp16, whatever ``compute``."""
    from lowbit.gpu_layers import DTYPE, GpuEmbedding, GpuLinear
    from lowbit.kernels import GpuWeight
    from lowbit.kernels.launch import serves

    weight = GpuWeight.from_packed_matrix(matrix).to(device)
    kernels = {f"{serves(weight.bits, rows, weight.device)} {weight.bits}-bit M={rows}" for rows in (1, _MANY_ROWS)}
    if name == "embed":
        return GpuEmbedding(weight), kernels
    return GpuLinear(weight, bias, torch.float32 if name == "head" else DTYPE), kernels


def relay(matrix: PackedMatrix) -> ops.PackedWeight:
    """A matrix of a file in the kernels' layout. Ternary codes lie five to a byte in a file, four in a kernel."""
    rows, k = matrix.codes_packed, matrix.shape[1]
    if matrix.table.name == "ternary":
        rows = bitpack.pack_codes(bitpack.unpack_ternary(rows, k), 2)
    levels = torch.tensor(matrix.table.padded, dtype=torch.int8)
    return ops.PackedWeight.from_canonical(rows, matrix.scale, levels, matrix.bits, k, matrix.group)


def _common(path: PathLike, model: TransformerLM, device: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "device": device,
        "threads": ops.get_threads() if device == "cpu" else None,
        "parameters": model.config.n_parameters(),
    }
