"""The CUDA kernels on a CPU: their own source compiled by g++ over csrc/cuda/simt.h, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lowbit.kernels import GpuWeight

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"


class CWeight(ctypes.Structure):
    """lowbit::gpu::Weight of csrc/cuda/api.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("levels", ctypes.c_int8 * 16),
        ("n", ctypes.c_int), ("k", ctypes.c_int), ("bits", ctypes.c_int), ("group", ctypes.c_int),
        ("lookup", ctypes.c_bool),
    ]  # fmt: skip

    @classmethod
    def of(cls, w: GpuWeight) -> CWeight:
        levels = (ctypes.c_int8 * 16)(*(w.levels if w.bits < 8 else []))
        return cls(w.codes.data_ptr(), w.scales.data_ptr(), levels, *w.shape, w.bits, w.group, w.affine is None)


class CLinear(ctypes.Structure):
    """lowbit::gpu::Linear of csrc/cuda/api.h."""

    _fields_ = [
        ("w", CWeight),
        ("x", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p), ("partial", ctypes.c_void_p), ("arrived", ctypes.c_void_p),
        ("packed_x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64), ("y_stride", ctypes.c_int64),
        ("m", ctypes.c_int), ("splits", ctypes.c_int), ("activation", ctypes.c_int),
        ("bf16", ctypes.c_bool), ("y_fp32", ctypes.c_bool), ("early", ctypes.c_bool), ("tile_m", ctypes.c_int),
    ]  # fmt: skip


class CArray(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


def arrays(*tensors: torch.Tensor | None):
    """What a kernel may touch: ctypes array of address and extent in bytes."""
    real = [t for t in tensors if t is not None]
    extents = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1 for t in real]
    return (CArray * len(real))(*(CArray(t.data_ptr(), e * t.element_size()) for t, e in zip(real, extents))), len(real)


class Host:
    """The library's functions; errors of a kernel become RuntimeError."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))
        for name in ("host_unpack", "host_linear", "host_rows", "host_panel"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def call(self, name: str, *args) -> None:
        if error := getattr(self.lib, name)(*args):
            raise RuntimeError(error.decode())

    def place(self, bits: int, n: int, k: int, chunks: int) -> tuple[int, int]:
        word, bit = ctypes.c_int64(), ctypes.c_int()
        sizes = (ctypes.c_int64(v) for v in (n, k, chunks))
        self.lib.host_place(bits, *sizes, ctypes.byref(word), ctypes.byref(bit))
        return word.value, bit.value

    def counts(self) -> tuple[int, int, int]:
        """Of the last product: shared-memory wavefronts, those without bank conflicts, mma."""
        out = (ctypes.c_int64 * 3)()
        self.lib.host_counts(out)
        return tuple(out)


class Emulated:
    """`lowbit._CUDA` on CPU tensors: what lowbit.kernels.cuda calls, run by the emulator. Remembers its calls."""

    def __init__(self, host: Host):
        self.host, self.calls, self.graph = host, [], 0
        self.everywhere = (CArray * 1)(CArray(1, 2**62))  # addresses only: extents are test_cuda_host's business

    def Weight(self, codes, scales, levels, n, k, bits, group, lookup):
        return CWeight(codes, scales, (ctypes.c_int8 * 16)(*levels), n, k, bits, group, lookup)

    def linear(self, w, x, x_stride, m, bf16, bias, residual, activation, y, y_stride, y_fp32, early, tile_m, splits,
               partial, arrived, packed_x, device, stream):  # fmt: skip
        self.calls.append({"splits": splits, "tile_m": tile_m, "arrived": arrived, "packed_x": packed_x})
        call = CLinear(w, x, bias, residual, y, partial, arrived, packed_x, x_stride, y_stride, m, splits, activation,
                       bf16, y_fp32, early, tile_m)  # fmt: skip
        self.host.call("host_linear", ctypes.byref(call), self.everywhere, 1, len(self.calls))

    def rows(self, w, ids, count, out, device, stream):
        pointers = (ctypes.c_void_p(ids), ctypes.c_int64(count), ctypes.c_void_p(out))
        self.host.call("host_rows", ctypes.byref(w), *pointers, self.everywhere, 1)

    def panel(self, w, bf16, first_row, count, out, device, stream):
        self.host.call("host_panel", ctypes.byref(w), bf16, first_row, count, ctypes.c_void_p(out), self.everywhere, 1)

    def has_wgmma(self, device):
        return True

    def recording(self, device, stream):
        return self.graph


def emulate(patch: pytest.MonkeyPatch, processors: int = 4) -> Emulated:
    """Put the emulator in the place of the extension, on CPU tensors, for the routes "cuda" and "dense"."""
    from lowbit.kernels import cuda, launch

    emulated = Emulated(build())
    patch.setattr(cuda, "module", lambda: emulated)
    patch.setattr(cuda, "_queue", lambda device: (0, 5))
    patch.setattr(cuda, "processors", lambda device: processors)
    patch.setattr(cuda, "_counters", {})
    patch.setattr(launch, "_route", lambda route, *_: route or "cuda")
    return emulated


def compiler() -> str:
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not path:
        pytest.skip("no C++ compiler")
    return path


def build() -> Host:
    """Compile once for these sources; several processes may do so at a time."""
    sources = sorted([*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h"), SOURCES / "hosttest.cpp"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = ROOT / "build" / "cuda_host" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler(), *flags, str(SOURCES / "hosttest.cpp"), "-o", str(part)], check=True)
        part.replace(target)
    return Host(target)
