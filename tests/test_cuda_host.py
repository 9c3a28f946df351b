"""The CUDA kernels' own source on a CPU (csrc/cuda/simt.h), against torch's layout and an fp64 oracle."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_host import CLinear, CWeight, Host, arrays, build

from lowbit import bitpack, quantize
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


def run(host, w, x, *, tile_m, splits=1, bias=None, residual=None, y_dtype=None, activation=0, seed=0,
        wgmma=False):  # fmt: skip
    """One launch with y, partial sums and counters in arrays of their exact size, NaN before."""
    m, n = x.shape[0], w.shape[0]
    y = torch.full((m, n), torch.nan, dtype=y_dtype or x.dtype)
    if residual is not None:
        y.copy_(residual)  # added in place, as the engine does
    partial = torch.full((splits, m, w.padded_rows), torch.nan)
    arrived = torch.zeros(-(-m // max(tile_m, 1)) * w.padded_rows // 32, dtype=torch.int32)
    shape = (-(-m // 128), -(-w.shape[1] // 64), 128, 64)
    packed = torch.full(shape, torch.nan, dtype=x.dtype) if wgmma else None
    call = CLinear(
        CWeight.of(w), x.data_ptr(), 0 if bias is None else bias.data_ptr(), 0 if residual is None else y.data_ptr(),
        y.data_ptr(), partial.data_ptr(), arrived.data_ptr(),
        0 if packed is None else packed.data_ptr(), x.stride(0), y.stride(0), m, splits, activation,
        x.dtype == torch.bfloat16, y.dtype == torch.float32, True, tile_m,
    )  # fmt: skip
    host.call("host_linear", ctypes.byref(call), *arrays(w.codes, w.scales, x, bias, y, partial, arrived, packed), seed)
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
    """|error| <= (K + 16) 2^-23 sum |x w| for fp32 sums of exact products (each addition, tensor cores' too, off by
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


@pytest.mark.parametrize("tile_m", [32, 64, 128])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_gemm(bits, table, tile_m, host):
    """Ragged edges on all sides; groups, splits, dtypes and biases take turns. More chunks than stages."""
    turn = FORMATS.index((bits, table)) + tile_m // 32
    m, n, k = {32: (40, 70, 380), 64: (70, 130, 328), 128: (130, 66, 260)}[tile_m]
    w, dense = weight(bits, table, n, k, 64 if turn % 2 else None)
    x = activations(m, k, DTYPES[turn % 2])
    bias = torch.randn(n) if turn % 3 else None
    y = run(host, w, x, tile_m=tile_m, splits=1 + turn % 3, bias=bias, y_dtype=torch.float32, seed=turn)
    check(y, x, dense, bias)
    found, ideal, products = host.counts()
    assert products > 0 and (found - ideal) / ideal <= 0.01, "shared-memory bank conflicts"


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_warp_group_products(bits, table, group, host):
    """Ragged edges on all sides, one chunk and more than there are stages; both types of x."""
    turn = FORMATS.index((bits, table)) + (group or 0) // 64
    for i, (m, n, k, splits) in enumerate([(130, 66, 380, 1), (7, 130, 60, 1), (128, 200, 650, 2)]):
        w, dense = weight(bits, table, n, k, group if k > 64 else None)
        x = activations(m, k, DTYPES[(turn + i) % 2])
        bias = torch.randn(n) if i else None
        y = run(host, w, x, tile_m=128, splits=splits, bias=bias, y_dtype=torch.float32, seed=turn, wgmma=True)
        check(y, x, dense, bias)
        found, ideal, products = host.counts()
        assert products > 0 and (found - ideal) / ideal <= 0.01, "shared-memory bank conflicts"


@pytest.mark.parametrize("tile_m", [16, 32])
def test_groups_wider_than_a_chunk(tile_m, host):
    w, dense = weight(4, None, 64, 512, 128)
    x = activations(5, 512, torch.float16)
    check(run(host, w, x, tile_m=tile_m, splits=3, y_dtype=torch.float32), x, dense)


@pytest.mark.parametrize("tile_m", [16, 64])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_residual_and_activation(tile_m, y_dtype, host):
    """y += activation(x W^T + bias), in place, with and without splits."""
    w, dense = weight(2, None, 40, 200)
    dtype = torch.float16 if y_dtype == torch.float32 else y_dtype
    x, bias = activations(3, 200, dtype), torch.randn(40)
    x[:, :200] *= 0.05
    residual = torch.randn(3, 40).to(y_dtype)
    for activation, function in enumerate([lambda v: v, torch.relu, torch.nn.functional.gelu]):
        y = run(host, w, x, tile_m=tile_m, splits=1 + activation % 2, bias=bias, residual=residual, y_dtype=y_dtype,
                activation=activation)  # fmt: skip
        before = x[:, :200].double() @ dense.T + bias.double()
        wanted = residual.double() + function(before)
        unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[y_dtype]
        size = x[:, :200].double().abs() @ dense.abs().T + bias.abs() + residual.double().abs()
        assert bool(((y.double() - wanted).abs() <= unit * size + 216 * 2.0**-23 * size).all())


def test_the_order_of_threads_and_blocks_does_not_matter(host):
    """A missing barrier, or sums in the order of arrival, would show as other bits under another schedule."""
    w, _ = weight(4, None, 130, 640, 64)
    for tile_m, m in ((16, 9), (32, 33)):
        x = activations(m, 640, torch.float16)
        first, *others = (run(host, w, x, tile_m=tile_m, splits=3, y_dtype=torch.float32, seed=s) for s in range(4))
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tile_m", [16, 32])
def test_infinite_activations_stay_in_their_row(tile_m, host):
    w, _ = weight(2, None, 64, 128)
    x = activations(4, 128, torch.float16)
    clean = run(host, w, x, tile_m=tile_m)
    x[2, 50] = torch.inf
    y = run(host, w, x, tile_m=tile_m)
    keep = [0, 1, 3]
    assert torch.equal(y[keep], clean[keep]) and not bool(torch.isfinite(y[2]).any())


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_rows_and_panels(bits, table, group, host):
    n, k = 70, 200
    w, dense = weight(bits, table, n, k, group)
    ids = torch.tensor([69, 0, 33, 33])
    out = torch.full((4, k), torch.nan)
    where = arrays(w.codes, w.scales, ids, out)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (ids, out))
    host.call("host_rows", ctypes.byref(CWeight.of(w)), next(pointers), ctypes.c_int64(4), next(pointers), *where)
    assert torch.equal(out.double(), dense[ids])
    for dtype in DTYPES:
        panel = torch.full((64, 256), torch.nan, dtype=dtype)  # rows 64 .. 127, of which 6 exist
        where = arrays(w.codes, w.scales, panel)
        bf16 = dtype == torch.bfloat16
        where = (ctypes.c_void_p(panel.data_ptr()), *where)
        host.call("host_panel", ctypes.byref(CWeight.of(w)), bf16, 64, 64, *where)
        assert torch.equal(panel[: n - 64, :k], dense[64:].to(dtype))
        assert not bool(panel[n - 64 :].any()) and bool(torch.isfinite(panel).all())


def test_the_machine_finds_what_it_looks_for(host):
    """An array that is shorter than the kernel believes."""
    w, _ = weight(4, None, 64, 128)
    x = activations(2, 128, torch.float16)
    y = torch.empty(2, 64)
    call = CLinear(
        CWeight.of(w), x.data_ptr(), 0, 0, y.data_ptr(), 0, 0, 0, x.stride(0), 64, 2, 1, 0, False, True, True, 16
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="outside of every array"):
        host.call("host_linear", ctypes.byref(call), *arrays(w.codes, w.scales, x[:1], y), 0)
    with pytest.raises(RuntimeError, match="outside of every array"):
        host.call("host_linear", ctypes.byref(call), *arrays(w.codes[:-1], w.scales, x, y), 0)
