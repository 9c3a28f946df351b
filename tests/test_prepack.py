"""The prepacked layout of csrc/layout.h against a plain numpy reading of its diagrams."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import LowbitError, PackedWeight, quantize
from lowbit.bitpack import pack_codes, row_bytes
from lowbit.ops import _C, packed
from lowbit.tables import find_table


def naive_tiles(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [blocks, tiles, 128 * bits], byte by byte as the diagrams say."""
    n, k = codes.shape
    blocks, tiles, per = -(-n // 16), -(-k // 64), 8 // bits
    out = np.zeros((blocks, tiles, 2 * bits, 16, 4), dtype=np.uint8)  # [.., vector, output, input]
    for row in range(n):
        for col in range(k):
            r = col % 64 // 4
            out[row // 16, col // 64, r // per, row % 16, col % 4] |= codes[row, col] << (r % per * bits)
    return out.reshape(blocks, tiles, 128 * bits)


def levels(bits: int) -> torch.Tensor:
    return torch.tensor(find_table(bits).padded, dtype=torch.int8)


@given(bits=st.sampled_from([1, 2, 4, 8]), n=st.integers(1, 40), k=st.integers(1, 150), seed=st.integers(0, 99))
def test_tiles_follow_the_diagram(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    weight = PackedWeight.from_canonical(pack_codes(codes, bits), torch.ones(n, 1).half(), levels(bits), bits, k)
    np.testing.assert_array_equal(weight.tiles.numpy(), naive_tiles(codes.numpy(), bits))
    assert weight.tiles.data_ptr() % 64 == 0 and weight.scales.data_ptr() % 64 == 0


@pytest.mark.parametrize("bits, table", [(1, None), (2, None), (2, "ternary"), (2, "pow2"), (4, "pow2"), (8, None)])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_rows_come_back_exactly(bits, table, group):
    q = quantize(torch.randn(37, 200), bits, table, group)
    ids = torch.tensor([[36, 0, 5], [16, 15, 36]])
    assert torch.equal(packed(q).dequantize_rows(ids), q.dequantize()[ids])
    assert packed(q).dequantize_rows(torch.empty(0, dtype=torch.int64)).shape == (0, 200)


@pytest.mark.parametrize(
    "k, group, span",
    [
        (100, 100, 100),
        (65536, 65536, 65536),
        (65537, 65537, 65536),
        (1 << 18, 1 << 17, 65536),
        (9000 * 64, 64 * 1500, 64 * 750),
    ],
)
def test_a_span_never_exceeds_what_int32_holds(k, group, span):
    assert _C.span_of(k, group) == span <= 65536
    assert group >= k or group % span == 0


def test_scales_of_long_groups_are_repeated():
    k = 70_000
    q = quantize(torch.randn(3, k), 1)
    assert packed(q).scales.shape == (1, 2, 16)
    assert torch.equal(packed(q).dequantize_rows(torch.arange(3)), q.dequantize())


@pytest.mark.parametrize("bad", [-1, 37])
def test_row_outside_the_matrix(bad):
    with pytest.raises(LowbitError, match=f"row {bad} lies outside a matrix of 37 rows"):
        packed(quantize(torch.randn(37, 20), 4)).dequantize_rows(torch.tensor([0, bad]))


def test_row_ids_must_be_integers():
    with pytest.raises(LowbitError, match="ids must be an int64 tensor"):
        packed(quantize(torch.randn(3, 20), 4)).dequantize_rows(torch.tensor([0.0]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "bits must be one of"),
        ({"k": 0}, "k must be a positive integer"),
        ({"k": 130}, r"packed_rows must be torch.uint8 \[N, 65\]"),
        ({"packed_rows": torch.zeros(5, 64)}, "packed_rows must be torch.uint8"),
        ({"scale": torch.ones(5, 2).half()}, r"scale must be torch.float16 \[5, 1\]"),
        ({"scale": torch.ones(5, 1)}, "scale must be torch.float16"),
        ({"table": torch.zeros(15, dtype=torch.int8)}, r"table must be torch.int8 \[16\]"),
        ({"group": 63}, "group must be a positive multiple of 64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "packed_rows": torch.zeros(5, row_bytes(128, 4), dtype=torch.uint8),
        "scale": torch.ones(5, 1).half(),
        "table": levels(4),
        "bits": 4,
        "k": 128,
        "group": None,
    }
    with pytest.raises(LowbitError, match=message):
        PackedWeight.from_canonical(**{**arguments, **change})


def test_eight_bit_tables_are_implicit():
    with pytest.raises(LowbitError, match="code - 128"):
        PackedWeight.from_canonical(
            torch.zeros(2, 64, dtype=torch.uint8),
            torch.ones(2, 1).half(),
            torch.zeros(256, dtype=torch.int8),
            8,
            64,
        )


def test_deepcopy_and_pickle_are_independent():
    q = quantize(torch.randn(20, 70), 2)
    weight = packed(q)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), packed(copy.deepcopy(q))):
        assert twin.tiles.data_ptr() != weight.tiles.data_ptr()
        assert torch.equal(twin.tiles, weight.tiles) and torch.equal(twin.scales, weight.scales)
    assert packed(q) is weight


def test_memory_is_what_it_says():
    weight = packed(quantize(torch.randn(512, 512), 4, group=128))
    assert weight.nbytes == 512 * 512 // 2 + 512 * 4 * 2 + 16
    assert repr(weight) == f"PackedWeight(512x512, 4 bits, group 128, {weight.nbytes} bytes)"
