"""What the GPU benchmarks share: timing by graph replays, the machine's ceilings, matrices without a training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from lowbit.kernels import GpuWeight
from lowbit.kernels.weight import ROW_PAD, codes_shape
from lowbit.quantize import table_tensor
from lowbit.tables import find_table

COLD_BYTES = 512 * 2**20  # rotate among inputs of at least this size: ten times the L2 cache of an H100


class Deadline:
    """Time that is left; benchmarks ask before each case and say what they left out."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end


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


def ceilings() -> dict[str, float]:
    """Bytes/s of a large device-to-device copy (read and written), FLOP/s of a large fp16 product."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_a_call([lambda: target.copy_(source)], rounds=2)
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    flops = 2 * 8192**3 / seconds_a_call([lambda: a @ b], rounds=4)
    return {"copy_bytes_per_s": copied, "fp16_flop_per_s": flops}


def random_weight(n: int, k: int, bits: int, group: int | None, device: str, seed: int) -> GpuWeight:
    """A matrix of random codes in the GPU layout: no quantizer needed, and no zeros, which would run faster."""
    gen = torch.Generator(device=device).manual_seed(seed)
    group = group or k
    shape = codes_shape(n, k, bits)
    codes = torch.randint(-(2**31), 2**31, shape, generator=gen, device=device, dtype=torch.int32)
    padded = -(-n // ROW_PAD) * ROW_PAD
    scales = (torch.rand(-(-k // group), padded, generator=gen, device=device) + 0.5).half() / k**0.5
    return GpuWeight(codes, scales, table_tensor(find_table(bits)).to(device), (n, k), bits, group)


def worst_error(y: torch.Tensor, x: torch.Tensor, weight: GpuWeight, rows: int = 64) -> float:
    """Relative error ||y - y64|| / ||y64|| of the first outputs against fp64."""
    ids = torch.arange(min(rows, weight.shape[0]), device=x.device)
    wanted = x.double() @ weight.dequantize_rows(ids).double().t()
    return float((y[:, : len(ids)].double() - wanted).norm() / wanted.norm())
