"""Kernels for many rows: every cut of K, N and M that they make, bit by bit.

Activations are integers whose largest magnitude in every row and span is 127, so that quantizing changes nothing
(sx = 1), and scales are powers of two. Sums then stay below 2**24 in units of the smallest scale: every fp32 operation
is exact, and so must the result be, whatever the order.
"""

from __future__ import annotations

import pytest
import torch

from lowbit import get_threads, linear, ops, quantize, set_threads
from lowbit.quantize import QuantTensor

KINDS = [(1, None), (2, None), (2, "pow2"), (4, None), (4, "pow2"), (8, None)]
# K: less than a tile; a whole number of the pieces that kernels cut K into, one input more; several pieces and a rest.
DEPTHS = [40, 384, 768, 769, 2000]


@pytest.fixture(params=ops.available_isas())
def isa(request):
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


@pytest.fixture
def two_threads():
    before = get_threads()
    set_threads(2)
    yield
    set_threads(before)


def weight(n: int, k: int, bits: int, table: str | None, group: int | None, seed: int) -> QuantTensor:
    gen = torch.Generator().manual_seed(seed)
    like = quantize(torch.randn(2, 64, generator=gen), bits, table)
    codes = torch.randint(0, len(like.levels.levels), (n, k), generator=gen, dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-2, 1, (n, -(-k // group) if group else 1), generator=gen)
    return QuantTensor(codes, like.table, scale.half(), bits, group or k, like.table_name)


def activations(m: int, k: int, group: int | None, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(-10, 11, (m, k), generator=gen).float()
    x[:, :: group or k] = 127
    return x


def exact_product(x: torch.Tensor, q: QuantTensor, bias: torch.Tensor) -> torch.Tensor:
    return (x.double() @ q.dequantize().double().T + bias.double()).float()


@pytest.mark.parametrize("bits, table", KINDS)
@pytest.mark.parametrize("k", DEPTHS)
def test_every_cut_of_k(isa, k, bits, table):
    for n, m, group in ((33, 49, None), (64, 33, 64), (48, 70, 256), (20, 32, 1024)):
        q, x, bias = weight(n, k, bits, table, group, k), activations(m, k, group, m), torch.arange(n).float()
        y = linear(x, q, bias)
        assert torch.equal(y, exact_product(x, q, bias)), f"{isa} M {m} N {n} K {k} group {group}"


@pytest.mark.parametrize("bits", [1, 8])
def test_every_number_of_rows(isa, bits):
    q, bias = weight(50, 200, bits, None, None, 0), torch.arange(50).float()
    for m in (*range(1, 35), 47, 48, 63, 64, 65, 97, 400):
        x = activations(m, 200, None, m)
        assert torch.equal(linear(x, q, bias), exact_product(x, q, bias)), f"{isa} M {m}"


@pytest.mark.parametrize("bits, n", [(4, 600), (8, 600), (8, 40)])
def test_either_way_to_share_the_work(isa, two_threads, bits, n):
    """Rows or outputs go to the members of a team (csrc/cpu/qlinear.cpp); both ways the result is the same."""
    q, bias = weight(n, 320, bits, None, None, 0), torch.arange(n).float()
    for m in (32, 64, 75, 129, 290):
        x = activations(m, 320, None, m)
        assert torch.equal(linear(x, q, bias), exact_product(x, q, bias)), f"{isa} M {m}"


@pytest.mark.parametrize("group", [None, 128])
def test_a_row_does_not_depend_on_its_neighbours(isa, group):
    q, x = weight(70, 900 if group is None else 1024, 4, None, group, 1), None
    x = torch.randn(67, q.shape[1], generator=torch.Generator().manual_seed(2))
    y = linear(x, q)
    alone = torch.cat([linear(x[i : i + 1], q) for i in range(len(x))])
    assert torch.equal(y, alone)
    x[5, 300] = float("nan")
    x[66, 0] = float("inf")
    broken = linear(x, q)
    assert broken[[5, 66]].isnan().all()
    kept = [i for i in range(67) if i not in (5, 66)]
    assert torch.equal(broken[kept], y[kept])
