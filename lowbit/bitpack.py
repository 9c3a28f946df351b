"""The canonical layout of codes in a file: row by row, little-endian within the byte, pad bits zero (DESIGN 4).

It knows no machine; every backend re-lays it at load. Ternary codes are stored five to a byte in base 3.
"""

from __future__ import annotations

import torch

from lowbit.errors import LowbitError

_POWERS_OF_3 = (1, 3, 9, 27, 81)
_SLICE = 1 << 20  # codes packed at a time, so that the temporaries of a large matrix stay small and in cache


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a packed row of ``k`` codes."""
    return -(-k * bits // 8)


def ternary_row_bytes(k: int) -> int:
    """Bytes of a row of ``k`` ternary codes, five to a byte."""
    return -(-k // 5)


def _pad_columns(codes: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zero-pad [N, K] to a multiple of columns and view it as [N, K / multiple, multiple]."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % multiple))
    return padded.view(n, -1, multiple)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, K] -> uint8 [N, ceil(K * bits / 8)].

    Raises:
        LowbitError: a code that does not fit in ``bits``.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise LowbitError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes.contiguous().clone()
    out = codes.new_empty(len(codes), row_bytes(codes.shape[1], bits))
    step = max(1, _SLICE // max(1, codes.shape[1]))
    for i in range(0, len(codes), step):
        rows, groups = out[i : i + step], _pad_columns(codes[i : i + step], 8 // bits)  # [rows, bytes, codes a byte]
        rows.copy_(groups[..., 0])
        for j in range(1, 8 // bits):
            rows |= groups[..., j] << (j * bits)
    return out


def unpack_codes(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`: uint8 [N, ceil(K * bits / 8)] -> uint8 codes [N, K]."""
    if packed.shape[1] != row_bytes(k, bits):
        raise LowbitError(
            f"packed rows have {packed.shape[1]} bytes, {k} codes of {bits} bits take {row_bytes(k, bits)}"
        )
    if bits == 8:
        return packed.clone()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :k].contiguous()


def pad_bits_are_zero(packed: torch.Tensor, bits: int, k: int) -> bool:
    """Whether the unused high bits of every row's last byte are zero."""
    used = k * bits % 8
    return used == 0 or not bool((packed[:, -1] >> used).any())


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..2 [N, K] -> uint8 [N, ceil(K / 5)], value = sum of code_i * 3**i; pad codes are 0."""
    if codes.numel() and int(codes.max()) > 2:
        raise LowbitError(f"code {int(codes.max())} is not a ternary code")
    weights = torch.tensor(_POWERS_OF_3, dtype=torch.uint8)
    return (_pad_columns(codes, 5) * weights).sum(-1, dtype=torch.uint8)


def unpack_ternary(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Inverse of :func:`pack_ternary`. Bytes above 242 are no five ternary digits.

    Raises:
        LowbitError: an invalid byte, or a non-zero pad digit.
    """
    if packed.shape[1] != ternary_row_bytes(k):
        raise LowbitError(f"packed rows have {packed.shape[1]} bytes, {k} ternary codes take {ternary_row_bytes(k)}")
    if packed.numel() and int(packed.max()) > 242:
        raise LowbitError(f"byte {int(packed.max())} does not hold five ternary codes")
    digits = torch.stack([packed // p % 3 for p in _POWERS_OF_3], dim=-1).flatten(1)
    if bool(digits[:, k:].any()):
        raise LowbitError("pad codes of a ternary row are not zero")
    return digits[:, :k].contiguous()
