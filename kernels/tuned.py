"""Measured choices in place of the tables' defaults: which kernel serves, with which tiles, on one GPU model.

`lowbit tune` writes the file; the first product on a GPU reads it. Nothing is measured at start-up. As for the CPU's
crossovers (:mod:`lowbit.tuning`), an environment variable names another file, which must exist, or switches it off:
LOWBIT_GPU_TUNING=FILE|off.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowbit import tuning
from lowbit.errors import LowbitError
from lowbit.files import read_json, write_json
from lowbit.kernels.config import BUCKETS, CONFIGS, ROUTE_NAMES, ROUTES, KernelConfig
from lowbit.tables import BITS

VARIABLE = "LOWBIT_GPU_TUNING"
VERSION = 1
_FIELDS = {"bits", "most_rows", "route", "triton"}

Choices = dict[tuple[int, int], tuple[str, KernelConfig]]  # (bits, bucket) -> route, tiles of the Triton kernel


def default_path(gpu: str) -> Path:
    """The file of a GPU of this name in the user's cache folder."""
    return tuning.cache_folder() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


@functools.cache
def apply_once(device: torch.device) -> Path | None:
    """Apply the choices for this device's model, if there are any; the file they came from.

    Raises:
        LowbitError: LOWBIT_GPU_TUNING names a file that does not exist, or the file is damaged or another GPU's.
    """
    if os.environ.get(VARIABLE) == "off":
        return None
    gpu = torch.cuda.get_device_name(device)
    named = tuning.chosen_path(VARIABLE)
    path = named or default_path(gpu)
    if not named and not path.exists():
        return None
    try:
        apply(read(path, gpu))
    except LowbitError as error:
        raise LowbitError(f"{error} ({VARIABLE}=off ignores it)") from None
    return path


def apply(choices: Choices) -> None:
    """Replace entries of ROUTES and CONFIGS."""
    for key, (route, config) in choices.items():
        ROUTES[key] = route
        CONFIGS[key] = config


def read(path: str | os.PathLike[str], gpu: str) -> Choices:
    """The choices of a file.

    Raises:
        LowbitError: the file is damaged or was measured on another GPU model.
    """
    data = read_json(path)
    try:
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}")
        if data["gpu"] != gpu:
            raise LowbitError(f"{path}: was measured on {data['gpu']!r}, this is {gpu!r}: run lowbit tune")
        return dict(_entry(entry) for entry in data["choices"])
    except (KeyError, TypeError, ValueError) as error:
        raise LowbitError(f"{path}: no file of lowbit tune ({error!r}): delete it, or run lowbit tune") from None


def _entry(entry: dict[str, Any]) -> tuple[tuple[int, int], tuple[str, KernelConfig]]:
    if set(entry) != _FIELDS or entry["bits"] not in BITS or entry["route"] not in ROUTE_NAMES:
        raise ValueError(f"bad choice {entry}")
    try:
        config = KernelConfig(**entry["triton"])
    except LowbitError as error:
        raise ValueError(str(error)) from None
    return (entry["bits"], BUCKETS.index(entry["most_rows"])), (entry["route"], config)


def write(path: str | os.PathLike[str], gpu: str, choices: Choices, measured: Sequence[dict[str, Any]] = ()) -> None:
    """Replace the file in one step. Makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"bits": bits, "most_rows": BUCKETS[bucket], "route": route, "triton": asdict(config)}
        for (bits, bucket), (route, config) in sorted(choices.items())
    ]
    write_json(path, {"version": VERSION, "gpu": gpu, "choices": entries, "measured": list(measured)})


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


def worst_error(y: torch.Tensor, x: torch.Tensor, weight, rows: int = 64) -> float:
    """Relative error ||y - y64|| / ||y64|| of the first outputs of y [M, N] = x W^T against fp64."""
    ids = torch.arange(min(rows, weight.shape[0]), device=x.device)
    wanted = x.double() @ weight.dequantize_rows(ids).double().t()
    return float((y[:, : len(ids)].double() - wanted).norm() / wanted.norm())
