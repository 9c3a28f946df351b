"""Canonical packing: lossless for every width and ragged K, equal to the layout's definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import bitpack
from lowbit.errors import LowbitError

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 150))


def random_codes(shape, levels: int, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, shape, generator=gen, dtype=torch.uint8)


@given(SIZES, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31))
def test_round_trip(shape, bits, seed):
    codes = random_codes(shape, 2**bits, seed)
    packed = bitpack.pack_codes(codes, bits)
    assert packed.shape == (shape[0], bitpack.row_bytes(shape[1], bits))
    assert bitpack.pad_bits_are_zero(packed, bits, shape[1])
    assert torch.equal(bitpack.unpack_codes(packed, bits, shape[1]), codes)


@given(SIZES, st.integers(0, 2**31))
def test_ternary_round_trip(shape, seed):
    codes = random_codes(shape, 3, seed)
    packed = bitpack.pack_ternary(codes)
    assert packed.shape == (shape[0], bitpack.ternary_row_bytes(shape[1]))
    assert torch.equal(bitpack.unpack_ternary(packed, shape[1]), codes)


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31))
def test_layout_is_little_endian_within_the_byte(k, bits, seed):
    """A row read as one little-endian integer is sum of code[k] << (k * bits): the format's definition."""
    codes = random_codes((1, k), 2**bits, seed)
    row = int.from_bytes(bytes(bitpack.pack_codes(codes, bits)[0].tolist()), "little")
    assert row == sum(c << (i * bits) for i, c in enumerate(codes[0].tolist()))


def test_ternary_byte_is_base_3():
    codes = torch.tensor([[2, 1, 0, 0, 1, 2]], dtype=torch.uint8)
    assert bitpack.pack_ternary(codes).tolist() == [[2 + 1 * 3 + 1 * 81, 2]]


def test_packing_does_not_alias_its_input():
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    bitpack.pack_codes(codes, 8)[0, 0] = 9
    bitpack.unpack_codes(codes, 8, 4)[0, 0] = 9
    assert not codes.any()


def test_non_contiguous_codes():
    codes = random_codes((6, 10), 16, 0).T
    assert torch.equal(bitpack.unpack_codes(bitpack.pack_codes(codes, 4), 4, 6), codes)
    assert torch.equal(bitpack.unpack_ternary(bitpack.pack_ternary(codes % 3), 6), codes % 3)


@pytest.mark.parametrize(("code", "bits"), [(2, 1), (4, 2), (16, 4)])
def test_code_too_wide(code, bits):
    with pytest.raises(LowbitError, match=f"code {code} does not fit"):
        bitpack.pack_codes(torch.full((2, 3), code, dtype=torch.uint8), bits)


def test_ternary_refuses():
    with pytest.raises(LowbitError, match="not a ternary code"):
        bitpack.pack_ternary(torch.full((1, 2), 3, dtype=torch.uint8))
    with pytest.raises(LowbitError, match="byte 243"):
        bitpack.unpack_ternary(torch.tensor([[243]], dtype=torch.uint8), 5)
    with pytest.raises(LowbitError, match="pad codes"):
        bitpack.unpack_ternary(torch.tensor([[81]], dtype=torch.uint8), 4)
    with pytest.raises(LowbitError, match="2 bytes"):
        bitpack.unpack_ternary(torch.zeros(1, 2, dtype=torch.uint8), 4)


def test_wrong_row_length():
    with pytest.raises(LowbitError, match="packed rows have 2 bytes"):
        bitpack.unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 1, 17)


def test_pad_bits():
    assert not bitpack.pad_bits_are_zero(torch.tensor([[0b1000_0000]], dtype=torch.uint8), 1, 7)
    assert bitpack.pad_bits_are_zero(torch.tensor([[0b1000_0000]], dtype=torch.uint8), 1, 8)
