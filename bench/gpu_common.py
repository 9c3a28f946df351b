"""What the GPU benchmarks share: the machine's ceilings, the time that is left."""

from __future__ import annotations

import time

import torch

from lowbit.kernels.tuned import seconds_a_call

COLD_BYTES = 512 * 2**20  # rotate among inputs of at least this size: ten times the L2 cache of an H100


class Deadline:
    """Time that is left; benchmarks ask before each case and say what they left out."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end


def ceilings() -> dict[str, float]:
    """Bytes/s of a large device-to-device copy (read and written), FLOP/s of a large fp16 product."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_a_call([lambda: target.copy_(source)], rounds=2)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    flops = 2 * 8192**3 / seconds_a_call([lambda: a @ b], rounds=4)
    return {"copy_bytes_per_s": copied, "fp16_flop_per_s": flops}
