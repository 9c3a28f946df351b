"""`lowbit.linear` beside torch's fp32 linear, hot: pytest bench/test_linear.py --benchmark-enable -s

Each result is checked against the fp64 oracle before it is timed; the ratio compares minima of one run.
"""

from __future__ import annotations

import time

import pytest
import torch

from lowbit import isa, linear
from lowbit.ops import PackedWeight
from lowbit.quantize import QuantTensor, table_tensor
from lowbit.tables import find_table

SHAPES = [(512, 512), (2048, 512), (512, 2048), (10000, 512), (1000, 777)]
ROWS = [1, 8, 64]


def minimum(f, seconds: float = 0.05, repeats: int = 5) -> float:
    """Seconds a call, the least of several averages."""
    f()
    start = time.perf_counter()
    f()
    count = max(1, int(seconds / (time.perf_counter() - start + 1e-9)))
    averages = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            f()
        averages.append((time.perf_counter() - start) / count)
    return min(averages)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", ROWS)
def test_linear(benchmark, m: int, n: int, k: int, bits: int):
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), generator=gen, dtype=torch.uint8)
    scale = (torch.rand(n, 1, generator=gen) + 0.1).half()
    table = find_table(bits)
    q = QuantTensor(codes, table_tensor(table), scale, bits, k, table.name)
    weight, x, w = PackedWeight.from_quant_tensor(q), torch.randn(m, k, generator=gen), q.dequantize()

    oracle = x.double() @ w.double().T
    size = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1)
    assert float(((linear(x, weight).double() - oracle).abs() / size).max()) < 2e-2
    assert float(((linear(x, weight, compute="exact").double() - oracle).abs() / size).max()) < 2e-5

    benchmark(linear, x, weight)
    if benchmark.enabled:
        ours = minimum(lambda: linear(x, weight))
        fp32 = minimum(lambda: torch.nn.functional.linear(x, w))
        benchmark.extra_info.update(isa=isa(), kernel=weight.kernel_name(m), ratio_to_fp32=fp32 / ours)
        bound = f"{n * k * bits / 8 / ours / 1e9:.1f} GB/s, {2 * m * n * k / ours / 1e12:.3f} TOP/s"
        print(f"\n{weight.kernel_name(m)}: M {m} N {n} K {k}: {ours * 1e6:.1f} us, {bound}, {fp32 / ours:.1f}x fp32")
