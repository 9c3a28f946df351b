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
from lowbit.kernels.weight import prepack_codes, unprepack_codes
from lowbit.tables import BITS


@given(bits=st.sampled_from(BITS), n=st.integers(1, 40), k=st.integers(1, 300), seed=st.integers(0, 2**16))
def test_prepack_is_lossless(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    laid = prepack_codes(bitpack.pack_codes(codes, bits), bits, k)
    assert laid.shape == (-(-k // 64), n, 8 * bits)
    assert torch.equal(unprepack_codes(laid, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_diagram_says(bits):
    n, k, sub = 3, 130, 8 * bits
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    laid = prepack_codes(bitpack.pack_codes(codes, bits), bits, k)
    for i in range(3 * 64):
        chunk, inside = divmod(i, 64)
        plane, byte = divmod(inside, sub)
        found = (laid[chunk, :, byte].int() >> (plane * bits)) & (2**bits - 1)
        assert torch.equal(found, codes[:, i].int() if i < k else torch.zeros(n, dtype=torch.int32))


def test_row_blocks_do_not_show(monkeypatch):
    codes = torch.randint(0, 4, (11, 100), dtype=torch.uint8)
    rows = bitpack.pack_codes(codes, 2)
    whole = prepack_codes(rows, 2, 100)
    monkeypatch.setattr("lowbit.kernels.weight._ROWS_AT_ONCE", 4)
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
        assert weight.nbytes == -(-200 // 64) * 9 * 8 * bits + 2 * q.scale.numel() + 2**bits
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
    assert [bucket_of(m) for m in (1, 2, 16, 17, 64, 65, 256, 257, 10**6)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for (_, bucket), entry in CONFIGS.items():
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
