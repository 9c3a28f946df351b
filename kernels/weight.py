"""A quantized matrix as the GPU kernels read it, and the pure function that re-lays it from the canonical rows.

The layout is drawn in csrc/cuda/layout.cuh: codes lie in the order of tensor-core fragments, so that a CUDA kernel's
lane loads its own operands with 16-byte loads and unpacks them without a shuffle. As indices, with N padded to 64 and K
to chunks of 64 inputs (codes and scales of 0), b bits and a block's outputs R = 64, 32, 16, 16 at b = 1, 2, 4, 8:

    n = R block + 16 tile + 8 n8 + g         k = 64 chunk + 16 t + 4 s + 2 h + e
    lane = 4 g + t                           pair P = 4 s + 2 h + n8 = (16 / b) word + place
    u = code << (b place + 16 e), or-ed      stored: u rotated left by 2 (b < 8)

    codes int32 [N_pad / R, chunks, vectors, 32 lanes, 4]      vectors = 2 at 8 bits, else 1; with the last index
                                                               they count a lane's words b tile + word

A tile of outputs and a chunk is one contiguous run, whatever the bit width; 64 inputs is the grain of `group`, so that
a chunk never straddles two scales.

SCALES. fp16 [G, N_pad]: the scales of neighbouring outputs are neighbours.
"""

from __future__ import annotations

import torch

from lowbit import bitpack
from lowbit.container import PackedMatrix
from lowbit.errors import LowbitError
from lowbit.quantize import QuantTensor, check_group, describe
from lowbit.tables import BITS

CHUNK = 64  # inputs
ROW_PAD = 64  # outputs: N is padded to a multiple
BLOCK_ROWS = {1: 64, 2: 32, 4: 16, 8: 16}  # outputs whose words share 16-byte vectors
_CODES_AT_ONCE = 2**23  # bounds the one-code-a-byte intermediate of a prepack
_MAX_STEP = 4  # largest |a| of a level a * code + b whose constants are exact in 16-bit floats (csrc/cuda/dequant.cuh)


def codes_shape(n: int, k: int, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the codes of a matrix [n, k]."""
    padded = -(-n // ROW_PAD) * ROW_PAD
    return padded // BLOCK_ROWS[bits], -(-k // CHUNK), max(1, bits // 4), 32, 4


def _rotate(u: torch.Tensor, bits: int, by: int) -> torch.Tensor:
    """uint32 values in int64, rotated left by ``by`` where the width has a rotation."""
    return u if bits == 8 else ((u << by) | (u >> (32 - by))) & 0xFFFFFFFF


def prepack_codes(packed_rows: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Canonical rows uint8 [N, ceil(k * bits / 8)] -> GPU layout int32 :func:`codes_shape`; pure."""
    n = packed_rows.shape[0]
    out = torch.empty(codes_shape(n, k, bits), dtype=torch.int32)
    blocks_at_once = max(1, _CODES_AT_ONCE // (k * ROW_PAD)) * (ROW_PAD // BLOCK_ROWS[bits])
    for first in range(0, len(out), blocks_at_once):
        target = out[first : first + blocks_at_once]
        rows = packed_rows[first * BLOCK_ROWS[bits] :][: len(target) * BLOCK_ROWS[bits]]
        codes = bitpack.unpack_codes(rows, bits, k)
        codes = torch.nn.functional.pad(codes, (0, -k % CHUNK, 0, len(target) * BLOCK_ROWS[bits] - len(rows)))
        target.copy_(_prepack_blocks(codes, bits))
    return out


def _prepack_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [blocks * R, chunks * 64] -> int32 [blocks, chunks, vectors, 32, 4]."""
    rows, chunks = BLOCK_ROWS[bits], codes.shape[1] // CHUNK
    split = codes.view(-1, rows // 16, 2, 8, chunks, 4, 4, 2, 2)  # block tile n8 g | chunk t s h e
    lanes = split.permute(0, 4, 3, 5, 1, 6, 7, 2, 8)  # block chunk g t | tile | s h n8 | e
    lanes = lanes.reshape(len(split), chunks, 32, rows // 16 * bits, 16 // bits, 2)  # word place e
    u = torch.zeros(lanes.shape[:4], dtype=torch.int64)
    for place in range(16 // bits):
        for e in range(2):
            u |= lanes[..., place, e].long() << (bits * place + 16 * e)
    stored = _rotate(u, bits, 2).unflatten(3, (-1, 4)).transpose(2, 3)  # block chunk vector lane word
    return (stored - ((stored >> 31) << 32)).int()


def unprepack_codes(codes: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Inverse of :func:`prepack_codes`, to one code a byte: int32 :func:`codes_shape` -> uint8 [n, k]."""
    blocks, chunks = codes.shape[:2]
    u = _rotate(codes.transpose(2, 3).reshape(blocks, chunks, 32, -1).long() & 0xFFFFFFFF, bits, 30)
    shifts = torch.arange(0, 16, bits, device=u.device)[:, None] + torch.tensor([0, 16], device=u.device)
    split = ((u[..., None, None] >> shifts) & (2**bits - 1)).byte()
    split = split.view(blocks, chunks, 8, 4, BLOCK_ROWS[bits] // 16, 4, 2, 2, 2)  # block chunk g t tile s h n8 e
    wide = split.permute(0, 4, 7, 2, 1, 3, 5, 6, 8).reshape(blocks * BLOCK_ROWS[bits], chunks * CHUNK)
    return wide[:n, :k].contiguous()


class GpuWeight:
    """A quantized matrix in the GPU layout, on any device.

    Attributes:
        codes: int32 :func:`codes_shape`, see the module's diagrams.
        scales: fp16 [G, N_pad], G = ceil(K / group), N_pad = N rounded up to 64.
        table: int8 [2**bits], level of every code.
        levels: the table as integers, on the host.
        affine: (a, b) with level = a * code + b for every code, or None where levels are looked up.
        shape: (N, K); bits: 1, 2, 4 or 8; group: inputs a scale (K for one scale a row).
    """

    __slots__ = ("affine", "bits", "codes", "group", "levels", "native", "scales", "shape", "table")

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
        _expect("codes", codes, torch.int32, codes_shape(n, k, bits))
        _expect("scales", scales, torch.float16, (-(-k // group), -(-n // ROW_PAD) * ROW_PAD))
        _expect("table", table, torch.int8, (2**bits,))
        self.codes, self.scales, self.table = codes.contiguous(), scales.contiguous(), table.contiguous()
        self.shape, self.bits, self.group = (n, k), bits, group
        self.native = None  # the CUDA extension's view of it, made by cuda.view()
        self.levels: list[int] = table.tolist()
        self.affine = _affine(self.levels)
        if bits == 8 and self.affine != (1, -128):
            raise LowbitError("an 8-bit table must be level = code - 128")
        if bits == 1 and self.affine is None:
            raise LowbitError(f"1-bit levels must differ by 1 to {_MAX_STEP}, not be {self.levels}")

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

        Arguments as of :meth:`lowbit.ops.PackedWeight.from_canonical`: packed_rows uint8 [N, ceil(k * bits / 8)], scale
        fp16 [N, ceil(k / group)], table int8 [2**bits]; LowbitError for what does not fit.
        """
        if bits not in BITS or not isinstance(k, int) or k <= 0:
            raise LowbitError(f"no GPU weight has {bits!r} bits and K = {k!r}")
        group = k if group is None else min(group, k)
        if group != k:
            check_group(group)
        _expect("packed_rows", packed_rows, torch.uint8, (None, bitpack.row_bytes(k, bits)), "cpu")
        n = packed_rows.shape[0]
        _expect("scale", scale, torch.float16, (n, -(-k // group)), "cpu")
        scales = torch.nn.functional.pad(scale.t(), (0, -n % ROW_PAD)).contiguous()
        return cls(prepack_codes(packed_rows, bits, k), scales, table.clone(), (n, k), bits, group)

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

    @property
    def padded_rows(self) -> int:
        """N rounded up to a multiple of 64."""
        return self.scales.shape[1]

    def to(self, device: torch.device | str) -> GpuWeight:
        """The same weight on ``device``."""
        moved = (t.to(device) for t in (self.codes, self.scales, self.table))
        return GpuWeight(*moved, self.shape, self.bits, self.group)

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K]; exact."""
        n, k = self.shape
        levels = self.table.float()[unprepack_codes(self.codes, self.bits, n, k).long()]
        return levels * self.scales[:, :n].float().t().repeat_interleave(self.group, dim=1)[:, :k]

    def dequantize_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` (int64, any shape [...], inside [0, N)) as fp32 [..., K]: what an embedding needs; exact.

        In torch, on any device; on a GPU :func:`lowbit.kernels.cuda.rows` does the same in one kernel.
        """
        k, rows = self.shape[1], BLOCK_ROWS[self.bits]
        flat = ids.reshape(-1)
        blocks = self.codes[flat // rows]  # [count, chunks, vectors, 32, 4]
        codes = unprepack_codes(blocks, self.bits, len(flat) * rows, k).view(-1, rows, k)
        inside = codes[torch.arange(len(flat), device=flat.device), flat % rows].long()
        scales = self.scales[:, flat].float().t().repeat_interleave(self.group, dim=1)[:, :k]
        return (self.table.float()[inside] * scales).view(*ids.shape, k)

    def __repr__(self) -> str:
        n, k = self.shape
        return f"GpuWeight({n}x{k}, {self.bits} bits, group {self.group}, {self.nbytes} bytes, {self.device})"


def _affine(levels: list[int]) -> tuple[int, int] | None:
    """(a, b) of ``level = a * code + b`` where 0 < |a| <= 4, or None. All levels count: a table's padding continues
    the line."""
    a, b = levels[1] - levels[0], levels[0]
    if not 0 < abs(a) <= _MAX_STEP:
        return None
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
