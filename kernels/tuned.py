"""Measured choices in place of the tables' defaults: which kernel serves, with which tiles, on one GPU model.

`lowbit tune` writes the file; the first product on a GPU reads it. Nothing is measured at start-up.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.kernels.config import BUCKETS, CONFIGS, ROUTE_NAMES, ROUTES, KernelConfig
from lowbit.tables import BITS

_FIELDS = {"bits", "most_rows", "route", "triton"}


def default_path(gpu: str) -> Path:
    """Where choices for a GPU of this name are kept: LOWBIT_TUNED, or lowbit/tuned-NAME.json in the user's cache."""
    if path := os.environ.get("LOWBIT_TUNED"):
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lowbit" / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


@functools.cache
def apply_once(device: torch.device) -> Path | None:
    """Apply the choices for this device's model, if there are any; the file they came from."""
    gpu = torch.cuda.get_device_name(device)
    path = default_path(gpu)
    if not path.is_file():
        return None
    apply(path, gpu)
    return path


def apply(path: Path, gpu: str) -> None:
    """Replace entries of ROUTES and CONFIGS by those of a file.

    Raises:
        LowbitError: a file that is damaged or was measured on another GPU model.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["gpu"] != gpu:
            raise LowbitError(f"{path}: was measured on {data['gpu']!r}, this is {gpu!r}: run lowbit tune")
        entries = [_entry(entry) for entry in data["choices"]]
    except (OSError, ValueError, KeyError, TypeError, LowbitError) as error:
        if isinstance(error, LowbitError) and str(error).startswith(str(path)):
            raise
        raise LowbitError(f"{path}: no file of lowbit tune ({error!r}): delete it, or run lowbit tune") from None
    for key, route, config in entries:
        ROUTES[key] = route
        CONFIGS[key] = config


def _entry(entry: dict[str, Any]) -> tuple[tuple[int, int], str, KernelConfig]:
    if set(entry) != _FIELDS or entry["bits"] not in BITS or entry["route"] not in ROUTE_NAMES:
        raise LowbitError(f"bad choice {entry}")
    return (entry["bits"], BUCKETS.index(entry["most_rows"])), entry["route"], KernelConfig(**entry["triton"])


def choice(bits: int, bucket: int, route: str, config: KernelConfig) -> dict[str, Any]:
    """An entry of the file."""
    return {"bits": bits, "most_rows": BUCKETS[bucket], "route": route, "triton": asdict(config)}


def seconds_a_call(calls: Sequence[Callable[[], object]], repeats: int = 7, rounds: int | None = None) -> float:
    """Median seconds of one of ``calls``, which run one after the other in one CUDA graph.

    Launch gaps of the host are so left out, as in decoding with graphs; different buffers in ``calls`` make it cold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    rounds = rounds or max(1, 20 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def random_weight(n: int, k: int, bits: int, group: int | None, device: str, seed: int):
    """A GpuWeight of random codes, for measurements: no quantizer needed, and no zeros, which would run faster."""
    from lowbit.kernels.weight import ROW_PAD, GpuWeight, codes_shape
    from lowbit.quantize import table_tensor
    from lowbit.tables import find_table

    gen = torch.Generator(device=device).manual_seed(seed)
    group = group or k
    codes = torch.randint(-(2**31), 2**31, codes_shape(n, k, bits), generator=gen, device=device, dtype=torch.int32)
    padded = -(-n // ROW_PAD) * ROW_PAD
    scales = (torch.rand(-(-k // group), padded, generator=gen, device=device) + 0.5).half() / k**0.5
    return GpuWeight(codes, scales, table_tensor(find_table(bits)).to(device), (n, k), bits, group)
