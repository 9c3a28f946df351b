"""The ceilings of this machine: read bandwidth by working set and peaks of instructions (bench/ceilings.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "ceilings.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp")
# Whose peak bounds the kernels of an instruction set; scalar has none worth the name.
PEAK_OF_ISA = {"amx": "amx", "avx512": "vnni", "avx2": "avx2", "neon": "neon"}


@dataclass(frozen=True)
class Bound:
    """The least time that a product can take: `seconds`, and by what ("read" or the name of a peak)."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do.

    read: bytes/s by working set in bytes, by the fastest way known. one_stream: the same where every core reads one
    stream. peak: operations/s by name, a multiply-add counting two.
    """

    read: dict[int, float]
    one_stream: dict[int, float]
    peak: dict[str, float]
    threads: int

    @classmethod
    def from_runs(cls, runs: Sequence[dict[str, Any]]) -> Ceilings:
        """The best of several runs of the probe, for a ceiling is what was reached at any time."""
        threads = {int(r["peak"]["threads"]) for r in runs}
        if len(threads) != 1:
            raise ValueError(f"probes with different numbers of threads: {sorted(threads)}")
        read, one_stream = (
            {int(size): max(r[name][size] for r in runs) for size in runs[0][name]} for name in ("read", "one_stream")
        )
        peak = {name: max(r["peak"][name] for r in runs) for name in runs[0]["peak"] if name != "threads"}
        return cls(read, one_stream, peak, threads.pop())

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second for a working set of so many bytes: the measured size next to it, on a logarithmic scale."""
        return self.read[self._size(working_set)]

    def gain(self, working_set: float) -> float:
        """How much faster the fastest way reads than one stream a core."""
        size = self._size(working_set)
        return self.read[size] / self.one_stream[size]

    def _size(self, working_set: float) -> int:
        return min(self.read, key=lambda s: abs(math.log2(s) - math.log2(max(working_set, 1))))

    def bound(self, nbytes: float, operations: float, working_set: float, isa: str) -> Bound:
        """The roofline: bytes over bandwidth, or operations over peak, whichever takes longer."""
        memory = Bound(nbytes / self.bandwidth(working_set), "read")
        name = PEAK_OF_ISA.get(isa)
        if name not in self.peak:
            return memory
        arithmetic = Bound(operations / self.peak[name], name)
        return max(memory, arithmetic, key=lambda b: b.seconds)


def program(folder: Path, *flags: str) -> Path:
    """The compiled probe in ``folder``, made anew where its source or flags changed; ``flags`` are added to its own."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    flags = (*FLAGS, *flags)
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *flags)).encode()).hexdigest()[:16]
    path = folder / f"ceilings-{key}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}.{os.getpid()}"
        subprocess.run([*compiler.split(), *flags, str(SOURCE), "-o", str(temporary)], check=True)
        os.replace(temporary, path)
    return path


def probe(folder: Path, seconds: float, threads: int) -> dict[str, Any]:
    """One run of the probe: {"read" and "one_stream": {bytes: bytes/s}, "peak": {name: operations/s, "threads": n}}."""
    env = {**os.environ, "OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"}
    done = subprocess.run(
        [str(program(folder)), str(seconds), str(threads)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


class Reader:
    """Memory that takes part in a comparison: read in every way the probe knows, in turn with what reads weights.

    The bandwidth of a shared host may change within a run; what is read in the same rounds meets the same state of it.
    """

    NBYTES = 1 << 29  # past a last cache, as the copies of a cold matrix are

    def __init__(self, folder: Path, threads: int):
        self._library = ctypes.CDLL(str(program(folder, "-shared", "-fPIC")))
        self._library.read_buffer.restype = ctypes.c_void_p
        self._library.read_buffer.argtypes = [ctypes.c_int64]
        self._library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self._threads = threads
        self._memory = self._library.read_buffer(self.NBYTES)
        if self._memory is None:
            raise MemoryError(f"no {self.NBYTES >> 20} MiB of memory to read")
        one_stream = self._library.read_ways_of_one_stream()
        self.ways = {
            way: f"{'one stream' if way < one_stream else 'streams'} {way}" for way in range(self._library.read_ways())
        }

    def calls(self) -> dict[str, Callable[[], object]]:
        """Functions that read NBYTES, by the name of the way; names of one stream a core begin with 'one stream'."""
        read, memory = self._library.read_memory, self._memory
        return {name: lambda way=way: read(memory, self.NBYTES, self._threads, way) for way, name in self.ways.items()}
