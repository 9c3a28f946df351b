"""The CUDA kernels' own source on a CPU (csrc/cuda/simt.h), against torch's layout and an fp64 oracle."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_host import Host, CLinear, CWeight, arrays, build

from lowbit import quantize
from lowbit.kernels import GpuWeight
from lowbit.kernels.weight import prepack_codes, unprepack_codes
from lowbit.tables import BITS

FORMATS = [(1, None), (2, None), (2, "ternary"), (2, (-9, -2, 3, 11)), (4, None), (4, "pow2"), (8, None)]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def host() -> Host:
    return build()


def weight(bits: int, table, n: int, k: int, group: int | None = None, seed: int = 0) -> tuple[GpuWeight, torch.Tensor]:
    """A random matrix, and its fp64 values [n, k] from the quantizer's own dequantization."""
    gen = torch.Generator().manual_seed(seed + n + k)
    q = quantize(torch.randn(n, k, generator=gen), bits, table, group)
    return GpuWeight.from_quant_tensor(q), q.dequantize().double()


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_the_one_of_the_kernels(bits, host):
    """torch's prepack against layout.cuh's formula, code by code."""
    n, k = 70, 130
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    from lowbit import bitpack

    laid = prepack_codes(bitpack.pack_codes(codes, bits), bits, k)
    words = (laid.flatten().long() & 0xFFFFFFFF).tolist()
    seen = set()
    for i, j in itertools.product(range(n), range(k)):
        word, bit = host.place(bits, i, j, -(-k // 64))
        value = words[word] >> bit | words[word] << (32 - bit)
        assert value & (2**bits - 1) == codes[i, j]
        seen.add((word, bit))
    assert len(seen) == n * k
    assert torch.equal(unprepack_codes(laid, bits, n, k), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_unpacking_is_exact(bits, table, dtype, host):
    """Every code in every place of a word."""
    w, _ = weight(bits, table, 16, 64)
    count = max(1, bits // 2)  # words of half a chunk
    for half, seed in itertools.product(range(2), range(8)):
        gen = torch.Generator().manual_seed(seed)
        stored = torch.randint(0, 2**32, (count,), generator=gen).tolist()
        words, out = (ctypes.c_uint32 * count)(*stored), (ctypes.c_uint32 * 8)()
        host.call("host_unpack", ctypes.byref(CWeight.of(w)), dtype == torch.bfloat16, words, half, out)
        raw = torch.tensor([[v & 0xFFFF, v >> 16] for v in out], dtype=torch.int32).to(torch.uint16)
        levels = raw.view(dtype)
        places = 16 // bits
        for i in range(8):
            u = stored[i // places]
            u = u if bits == 8 else (u >> 2 | u << 30) & 0xFFFFFFFF
            place = (i + 8 * half) % places if bits == 1 else i % places
            for e in range(2):
                code = u >> (bits * place + 16 * e) & (2**bits - 1)
                assert float(levels[i, e]) == w.levels[code], (half, i, e, code)


def run(host, w, x, *, tile_m, splits=1, bias=None, residual=None, y_dtype=None, activation=0, seed=0):
    """One launch with y, partial sums and counters in arrays of their exact size, NaN before."""
    m, (n, k) = x.shape[0], w.shape
    y = torch.full((m, n), torch.nan, dtype=y_dtype or x.dtype)
    if residual is not None:
        y.copy_(residual)  # added in place, as the engine does
    partial = torch.full((splits, m, w.padded_rows), torch.nan)
    arrived = torch.zeros(-(-m // max(tile_m, 1)) * w.padded_rows // 32, dtype=torch.int32)
    call = CLinear(
        CWeight.of(w), x.data_ptr(), 0 if bias is None else bias.data_ptr(), 0 if residual is None else y.data_ptr(),
        y.data_ptr(), partial.data_ptr(), arrived.data_ptr(), x.stride(0), y.stride(0), m, splits, activation,
        x.dtype == torch.bfloat16, y.dtype == torch.float32, tile_m,
    )  # fmt: skip
    host.call("host_linear", ctypes.byref(call), *arrays(w.codes, w.scales, x, bias, y, partial, arrived), seed)
    assert not bool(arrived.any()), "counters are left at zero"
    return y


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, k] whose rows lie further apart than k: zeros up to a multiple of 8, NaN behind, which must not be read."""
    pitch, whole = -(-k // 8) * 8 + 8, -(-k // 8) * 8
    x = torch.full((m, pitch), torch.nan, dtype=dtype)
    x[:, :whole] = 0
    x[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)
    return x[:, :whole]


def check(y, x, dense, bias=None, residual=None):
    """|error| <= (K + 16) 2^-23 sum |x w| for fp32 sums of exact products (each addition, tensor cores' included, off by
    at most 2^-23 of the sum so far; scales, bias, residual and splits a few more), then half a unit of y's dtype."""
    unit = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    x = x[:, : dense.shape[1]].double()
    bias = torch.zeros(len(dense), dtype=torch.float64) if bias is None else bias.double()
    residual = torch.zeros(1, dtype=torch.float64) if residual is None else residual.double()
    size = x.abs() @ dense.abs().T + bias.abs() + residual.abs()
    wanted = x @ dense.T + bias + residual
    tolerance = (dense.shape[1] + 16) * 2.0**-23 * size + unit * wanted.abs() + (2.0**-24 if unit else 0)
    off = (y.double() - wanted).abs()
    assert bool((off <= tolerance).all()), f"off by {float(off.max()):g}, {float((off / tolerance).max()):g} of allowed"


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_gemv(bits, table, group, host):
    turn = FORMATS.index((bits, table)) + (group is not None)
    for i, (m, n, k, splits) in enumerate([(1, 70, 380, 1), (3, 64, 1160, 3), (9, 130, 64, 1), (16, 33, 520, 2)]):
        w, dense = weight(bits, table, n, k, group)
        x = activations(m, k, DTYPES[(turn + i) % 2])
        bias = torch.randn(n) if i % 2 else None
        y = run(host, w, x, tile_m=16, splits=splits, bias=bias, y_dtype=torch.float32 if i != 2 else None, seed=i)
        check(y, x, dense, bias)
