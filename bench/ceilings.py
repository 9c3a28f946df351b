"""The ceilings of this machine: read bandwidth by working set and peaks of instructions (bench/ceilings.cpp)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
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


def program(folder: Path) -> Path:
    """The compiled probe in ``folder``, made anew where its source or flags changed."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode()).hexdigest()[:16]
    path = folder / f"ceilings-{key}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}.{os.getpid()}"
        subprocess.run([*compiler.split(), *FLAGS, str(SOURCE), "-o", str(temporary)], check=True)
        os.replace(temporary, path)
    return path


def probe(folder: Path, seconds: float, threads: int) -> dict[str, Any]:
    """One run of the probe: {"read" and "one_stream": {bytes: bytes/s}, "peak": {name: operations/s, "threads": n}}."""
    env = {**os.environ, "OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"}
    done = subprocess.run(
        [str(program(folder)), str(seconds), str(threads)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)
