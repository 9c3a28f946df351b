"""The GPU layout and the table of tile sizes: pure host code, needs neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import bitpack, quantize
from lowbit.container import PackedMatrix
from lowbit.errors import LowbitError
from lowbit.kernels import GpuWeight, config
from lowbit.kernels.config import BUCKETS, CONFIGS, KernelConfig, bucket_of, find_config, fit_group, splits
from lowbit.kernels.weight import BLOCK_ROWS, codes_shape, prepack_codes, unprepack_codes
from lowbit.tables import BITS


@given(bits=st.sampled_from(BITS), n=st.integers(1, 40), k=st.integers(1, 300), seed=st.integers(0, 2**16))
def test_prepack_is_lossless(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    laid = prepack_codes(bitpack.pack_codes(codes, bits), bits, k)
    assert laid.shape == codes_shape(n, k, bits) and laid.numel() * 32 == -(-n // 64) * -(-k // 64) * 64 * 64 * bits
    assert torch.equal(unprepack_codes(laid, bits, n, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_docstring_says(bits):
    n, k, block_rows = 70, 130, BLOCK_ROWS[bits]
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    laid = prepack_codes(bitpack.pack_codes(codes, bits), bits, k).long() & 0xFFFFFFFF
    for i in range(0, 128, 3):
        tile, (n8, g) = i % block_rows // 16, divmod(i % 16, 8)
        for j in range(3 * 64):
            t, s, h, e = j % 64 // 16, j % 16 // 4, j % 4 // 2, j % 2
            word, place = divmod(4 * s + 2 * h + n8, 16 // bits)
            vector, word = divmod(tile * bits + word, 4)
            stored = int(laid[i // block_rows, j // 64, vector, 4 * g + t, word])
            u = stored if bits == 8 else (stored >> 2 | stored << 30) & 0xFFFFFFFF
            found = u >> (bits * place + 16 * e) & (2**bits - 1)
            assert found == (int(codes[i, j]) if i < n and j < k else 0)


def test_row_blocks_do_not_show(monkeypatch):
    codes = torch.randint(0, 4, (200, 100), dtype=torch.uint8)
    rows = bitpack.pack_codes(codes, 2)
    whole = prepack_codes(rows, 2, 100)
    monkeypatch.setattr("lowbit.kernels.weight._CODES_AT_ONCE", 64 * 100)
    assert torch.equal(prepack_codes(rows, 2, 100), whole)


@pytest.mark.parametrize(
    ("bits", "table", "group"),
    [(1, None, None), (2, "ternary", 64), (2, "pow2", None), (4, None, 128), (4, "pow2", 64), (8, None, 64)],
)
def test_dequantizes_exactly(bits, table, group):
    q = quantize(torch.randn(9, 200), bits, table, group)
    for weight in (GpuWeight.from_quant_tensor(q), GpuWeight.from_packed_matrix(PackedMatrix.from_quant_tensor(q))):
        assert torch.equal(weight.dequantize(), q.dequantize())
        assert (weight.affine is None) == (table == "pow2" and bits == 4)
        groups = q.scale.shape[1]
        assert weight.nbytes == 4 * 64 * 64 * bits // 8 + 2 * groups * 64 + 2**bits
        ids = torch.tensor([[8, 0], [3, 3]])
        assert torch.equal(weight.dequantize_rows(ids), q.dequantize()[ids])
        assert weight.to("cpu").shape == (9, 200) and "9x200" in repr(weight)


def test_bad_weights_are_named():
    q = quantize(torch.randn(4, 100), 4, None, 64)
    rows = bitpack.pack_codes(q.codes, 4)
    with pytest.raises(LowbitError, match=r"packed_rows must be torch.uint8 \[N, 50\] on the CPU"):
        GpuWeight.from_canonical(rows[:, :-1], q.scale, q.table, 4, 100, 64)
    with pytest.raises(LowbitError, match=r"scale must be torch.float16 \[4, 2\]"):
        GpuWeight.from_canonical(rows, q.scale[:, :1], q.table, 4, 100, 64)
    with pytest.raises(LowbitError, match=r"table must be torch.int8 \[16\]"):
        GpuWeight.from_canonical(rows, q.scale, q.table[:3], 4, 100, 64)
    with pytest.raises(LowbitError, match="multiple of 64"):
        GpuWeight.from_canonical(rows, q.scale, q.table, 4, 100, 60)
    with pytest.raises(LowbitError, match="3 bits"):
        GpuWeight.from_canonical(rows, q.scale, q.table, 3, 100)


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, lowbit.kernels; assert not {'torch', 'triton'} & set(sys.modules)\n"
        "from lowbit.kernels import GpuWeight, linear; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_the_config_table_is_complete():
    assert set(CONFIGS) == {(bits, bucket) for bits in BITS for bucket in range(len(BUCKETS))}
    assert [bucket_of(m) for m in (1, 2, 16, 17, 64, 65, 256, 257, 1025)] == [0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert set(config.ROUTES) == set(CONFIGS) and set(config.ROUTES.values()) <= set(config.ROUTE_NAMES)
    for (bits, bucket), entry in CONFIGS.items():
        assert entry.block_n % BLOCK_ROWS[bits] == 0
        gemv = bucket <= bucket_of(config.GEMV_MAX_ROWS)
        assert (entry.block_m >= BUCKETS[bucket]) if gemv else (entry.block_m >= 16 and entry.split_k == 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 8}, "block_m must be 1 or at least 16"),
        ({"block_n": 48}, "block_n must be a power of two from 16 to 256"),
        ({"block_k": 32}, "block_k must be a power of two from 64 to 128"),
        ({"warps": 3}, "warps must be"),
        ({"stages": 0}, "stages must be"),
        ({"split_k": 2, "block_m": 32}, "split_k is for block_m up to 16"),
        ({"split_k": -1}, "split_k must be"),
        ({"block_m": 256, "block_n": 256}, "does not fit in registers"),
        ({"block_m": 256, "block_k": 128, "stages": 6}, "of shared memory"),
    ],
)
def test_bad_configs_are_refused(change, message):
    good = {"block_m": 16, "block_n": 64, "block_k": 64, "warps": 4, "stages": 3, "split_k": 1}
    KernelConfig(**good)
    with pytest.raises(LowbitError, match=message):
        KernelConfig(**good | change)


def test_an_iteration_stays_inside_a_group():
    for group, k, wanted in ((64, 256, 64), (192, 512, 64), (128, 256, 128), (100, 100, 128), (64, 64, 128)):
        assert fit_group(KernelConfig(16, 64, 128, 4, 3), group, k).block_k == wanted
    assert find_config(2, 5, 64, 1024).block_k == 64


@given(n=st.integers(1, 50_000), k=st.integers(1, 50_000), processors=st.integers(1, 200), wanted=st.integers(0, 64))
def test_no_split_is_empty(n, k, processors, wanted):
    entry = KernelConfig(1, 32, 64, 4, 4, split_k=wanted)
    parts, iterations = splits(entry, n, k, processors), -(-k // 64)
    assert 1 <= parts <= iterations
    bounds = [iterations * s // parts for s in range(parts + 1)]  # as the kernel computes them
    assert bounds[0] == 0 and bounds[-1] == iterations and all(a < b for a, b in pairwise(bounds))


@given(
    bits=st.sampled_from(BITS), tile=st.sampled_from(config.NATIVE_TILES), m=st.integers(1, 300),
    n=st.integers(1, 60_000), k=st.integers(1, 60_000), processors=st.integers(1, 200),
)  # fmt: skip
def test_splits_of_the_cuda_kernels(bits, tile, m, n, k, processors):
    m = min(m, 16) if tile == 16 else m
    padded = -(-n // 64) * 64
    parts = config.native_splits(bits, tile, m, padded, k, processors)
    assert 1 <= parts <= max(1, min(16, -(-k // 64)))
    assert config.native_blocks(bits, tile, m, padded) * (32 if tile == 16 and bits == 8 else 64) >= padded // 2
