"""What a call costs beside its kernel, and what prepacking costs in time and memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lowbit import _C, bitpack, linear
from lowbit.ops import PackedWeight
from lowbit.tools.timing import FULL, QUICK, compare, quartiles

MATRICES, SIZE, BITS = 8, 4096, 4  # 134 M weights


def test_call_overhead(benchmark, record, quick):
    """`lowbit.linear` over the extension's own call, on the smallest of products."""
    n, k = 16, 64
    rows = torch.zeros(n, bitpack.row_bytes(k, BITS), dtype=torch.uint8)
    table = torch.arange(-15, 16, 2, dtype=torch.int8)
    weight = PackedWeight.from_canonical(rows, torch.ones(n, 1).half(), table, BITS, k)
    x, y = torch.randn(1, k), torch.empty(1, n)
    raw = (weight._native, x.data_ptr(), 1, k, 0, y.data_ptr(), False)
    calls = {"lowbit.linear": lambda: linear(x, weight), "native": lambda: _C.linear(*raw)}
    times = compare(calls, QUICK if quick else FULL)
    benchmark.pedantic(calls["lowbit.linear"], rounds=5, iterations=1000)
    whole, native = (1e6 * quartiles(times[name])[1] for name in calls)
    record.add(kind="cost", id="overhead", us=whole - native, linear_us=whole, native_us=native)


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_prepack(benchmark, record):
    """134 M weights of 4 bits, matrix by matrix; extra memory is what is resident beside the weights made so far."""
    gen = torch.Generator().manual_seed(0)
    scale, table = torch.ones(SIZE, 1).half(), torch.arange(-15, 16, 2, dtype=torch.int8)
    few = torch.zeros(16, bitpack.row_bytes(SIZE, BITS), dtype=torch.uint8)
    PackedWeight.from_canonical(few, scale[:16], table, BITS, SIZE)  # code that is read for the first time counts too
    seconds, extra, kept = 0.0, 0, []
    for _ in range(MATRICES):
        rows = torch.randint(0, 256, (SIZE, bitpack.row_bytes(SIZE, BITS)), dtype=torch.uint8, generator=gen)
        forget_peak()
        # Over the source alone: what the allocator keeps of released sources is not prepacking's.
        before = resident("VmRSS") - rows.nbytes
        start = time.perf_counter()
        kept.append(PackedWeight.from_canonical(rows, scale, table, BITS, SIZE))
        seconds += time.perf_counter() - start
        extra = max(extra, resident("VmHWM") - before - kept[-1].nbytes)
    rows = torch.zeros(SIZE, bitpack.row_bytes(SIZE, BITS), dtype=torch.uint8)
    benchmark.pedantic(PackedWeight.from_canonical, args=(rows, scale, table, BITS, SIZE), rounds=3)
    record.add(
        kind="cost", id="prepack", seconds=seconds, weights=MATRICES * SIZE * SIZE, extra_nbytes=extra,
        matrix_nbytes=rows.nbytes,
    )  # fmt: skip
