"""A quantized matrix as the GPU kernels read it, and the pure function that re-lays it from the canonical rows.

CHUNKS. W [N, K] is cut along K into chunks of 64 inputs (zero codes pad the last one). A chunk of one output is
8 * bits bytes, and the chunks of all outputs follow each other before the next 64 inputs begin:

    codes uint8 [chunks, N, 8 * bits]            chunks = ceil(K / 64)

                    output 0      output 1      output 2            output N-1
    inputs   0..63  |8*bits bytes|8*bits bytes|8*bits bytes|  ...  |8*bits bytes|
    inputs 64..127  |8*bits bytes|8*bits bytes|8*bits bytes|  ...  |8*bits bytes|

A tile of BLOCK_N outputs x 64 inputs is therefore ONE run of BLOCK_N * 8 * bits contiguous bytes, whatever the bit
width: every warp reads whole 32-byte sectors with wide loads, also at 1 bit, where a row of a row-major matrix would
give 8 bytes and waste three quarters of each sector. 64 inputs is the grain of `group`, so that a chunk never
straddles two scales, and 128 bytes of fp16 activations, the widest shared-memory swizzle of tensor-core operands.

PLANES. In a chunk, byte j holds the inputs j, j + S, j + 2S ... of its 8 / bits planes, S = 8 * bits:

    bits = 4, S = 32:   byte j = | k = j+32 : 4 | k = j : 4 |                                      j = 0..31
    bits = 2, S = 16:   byte j = | k = j+48 : 2 | k = j+32 : 2 | k = j+16 : 2 | k = j : 2 |        j = 0..15
    bits = 1, S =  8:   byte j = | k = j+56 : 1 | ...                         | k = j : 1 |        j = 0..7
    bits = 8, S = 64:   byte j = k = j

One shift and one mask of a whole register of bytes gives neighbouring inputs (four to a register), and planes
stacked along a new axis are the inputs in natural order: a tile is unpacked by broadcasting, without shuffles, and
activations need no permutation. (Row-wise packing would leave every 8/bits-th input in a plane.)

SCALES. fp16 [G, N]: the scales of neighbouring outputs are neighbours.
"""

from __future__ import annotations

import torch

from lowbit import bitpack
from lowbit.container import PackedMatrix
from lowbit.errors import LowbitError
from lowbit.quantize import QuantTensor, check_group, describe
from lowbit.tables import BITS

CHUNK = 64  # inputs
_ROWS_AT_ONCE = 4096  # bounds the one-code-a-byte intermediate of a prepack


def prepack_codes(packed_rows: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Canonical rows uint8 [N, ceil(k * bits / 8)] -> GPU layout uint8 [ceil(k / 64), N, 8 * bits]; pure."""
    n, sub = packed_rows.shape[0], 8 * bits
    chunks = -(-k // CHUNK)
    out = torch.empty(chunks, n, sub, dtype=torch.uint8)
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = packed_rows[first : first + _ROWS_AT_ONCE]
        codes = torch.nn.functional.pad(bitpack.unpack_codes(rows, bits, k), (0, -k % CHUNK))
        planes = codes.view(len(rows), chunks, 8 // bits, sub)
        merged = planes[:, :, 0].clone()
        for i in range(1, 8 // bits):
            merged |= planes[:, :, i] << (i * bits)
        out[:, first : first + len(rows)] = merged.transpose(0, 1)
    return out


def unprepack_codes(codes: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Inverse of :func:`prepack_codes`, to one code a byte: uint8 [chunks, N, 8 * bits] -> uint8 [N, k]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    planes = (codes[:, :, None, :] >> shifts[:, None]) & (2**bits - 1)  # [chunks, N, planes, S]
    return planes.permute(1, 0, 2, 3).flatten(1)[:, :k].contiguous()


class GpuWeight:
    """A quantized matrix in the GPU layout, on any device.

    Attributes:
        codes: uint8 [ceil(K / 64), N, 8 * bits], see the module's diagrams.
        scales: fp16 [G, N], G = ceil(K / group).
        table: int8 [2**bits], level of every code.
        affine: (a, b) with level = a * code + b for every code, or None where levels are looked up.
        shape: (N, K); bits: 1, 2, 4 or 8; group: inputs a scale (K for one scale a row).
    """

    __slots__ = ("affine", "bits", "codes", "group", "scales", "shape", "table")

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        table: torch.Tensor,
        shape: tuple[int, int],
        bits: int,
        group: int,
    ):
        n, k = (int(size) for size in shape)
        if bits not in BITS or n <= 0 or k <= 0:
            raise LowbitError(f"no GPU weight has {bits!r} bits and shape [{n}, {k}]")
        if group != k:
            check_group(group)
        _expect("codes", codes, torch.uint8, (-(-k // CHUNK), n, 8 * bits))
        _expect("scales", scales, torch.float16, (-(-k // group), n))
        _expect("table", table, torch.int8, (2**bits,))
        self.codes, self.scales, self.table = codes.contiguous(), scales.contiguous(), table.contiguous()
        self.shape, self.bits, self.group = (n, k), bits, group
        self.affine = _affine(table.tolist())

    @classmethod
    def from_canonical(
        cls,
        packed_rows: torch.Tensor,
        scale: torch.Tensor,
        table: torch.Tensor,
        bits: int,
        k: int,
        group: int | None = None,
    ) -> GpuWeight:
        """Re-lay canonical packed rows; the result is on the CPU, :meth:`to` moves it.

        Args:
            packed_rows: uint8 [N, ceil(k * bits / 8)], see :mod:`lowbit.bitpack`; not kept.
            scale: fp16 [N, ceil(k / group)].
            table: int8 [2**bits].
            group: inputs a scale, a multiple of 64; None for one scale a row.

        Raises:
            LowbitError: a shape, dtype or value that does not fit.
        """
        if bits not in BITS or not isinstance(k, int) or k <= 0:
            raise LowbitError(f"no GPU weight has {bits!r} bits and K = {k!r}")
        group = k if group is None else min(group, k)
        if group != k:
            check_group(group)
        _expect("packed_rows", packed_rows, torch.uint8, (None, bitpack.row_bytes(k, bits)), "cpu")
        n = packed_rows.shape[0]
        _expect("scale", scale, torch.float16, (n, -(-k // group)), "cpu")
        return cls(prepack_codes(packed_rows, bits, k), scale.t().contiguous(), table.clone(), (n, k), bits, group)

    @classmethod
    def from_quant_tensor(cls, q: QuantTensor) -> GpuWeight:
        rows = bitpack.pack_codes(q.codes, q.bits)  # not q.pack(): ternary files use another packing
        return cls.from_canonical(rows, q.scale, q.table, q.bits, q.shape[1], q.group)

    @classmethod
    def from_packed_matrix(cls, matrix: PackedMatrix) -> GpuWeight:
        """From a matrix of a packed file."""
        return cls.from_quant_tensor(matrix.to_quant_tensor())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scales.nbytes + self.table.nbytes

    def to(self, device: torch.device | str) -> GpuWeight:
        """The same weight on ``device``."""
        moved = (t.to(device) for t in (self.codes, self.scales, self.table))
        return GpuWeight(*moved, self.shape, self.bits, self.group)

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K]; exact."""
        k = self.shape[1]
        levels = self.table.float()[unprepack_codes(self.codes, self.bits, k).long()]
        return levels * self.scales.float().t().repeat_interleave(self.group, dim=1)[:, :k]

    def __repr__(self) -> str:
        n, k = self.shape
        return f"GpuWeight({n}x{k}, {self.bits} bits, group {self.group}, {self.nbytes} bytes, {self.device})"


def _affine(levels: list[int]) -> tuple[int, int] | None:
    """(a, b) of ``level = a * code + b``, or None. All levels count: a table's padding continues the line."""
    a, b = levels[1] - levels[0], levels[0]
    return (a, b) if all(level == a * code + b for code, level in enumerate(levels)) else None


def _expect(name: str, t: object, dtype: torch.dtype, shape: tuple[int | None, ...], device: str | None = None) -> None:
    fits = (
        isinstance(t, torch.Tensor)
        and t.dtype == dtype
        and t.ndim == len(shape)
        and all(want is None or want == size for want, size in zip(shape, t.shape))
        and (device is None or t.device.type == device)
    )
    if not fits:
        wanted = ", ".join("N" if s is None else str(s) for s in shape)
        where = f" on the {device.upper()}" if device else ""
        raise LowbitError(f"{name} must be {dtype} [{wanted}]{where}, not {describe(t)}")
