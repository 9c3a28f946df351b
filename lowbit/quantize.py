"""Least-squares quantization of a weight matrix: ``w[n, k] ~ scale[n, k // group] * level[code[n, k]]`` (DESIGN 3).

The fit alternates between the nearest codes for given scales and the least-squares scales for given codes, so its
objective never rises. Scales are rounded to fp16 inside the fit: what training sees is what the file holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowbit import bitpack
from lowbit.errors import LowbitError
from lowbit.tables import FREE, Table, find_table, free_table

# Least-squares unit scales for N(0, 1) data, so that a start costs one RMS (Max 1960; DESIGN 3 gives the first two).
_GAUSSIAN_SCALE = {
    "binary": 0.798,
    "ternary": 1.224,
    "midrise2": 0.498,
    "pow2_2": 1.048,
    "midrise4": 0.1676,
    "pow2_4": 0.0511,
    "int8": 0.0284,
}
_MAX_GRID = (1.0, 0.75, 0.5)
_FP16_MAX, _FP16_TINY = 65504.0, 2.0**-24
_ITERATIONS = 12


@dataclass(eq=False)
class QuantTensor:
    """A quantized matrix.

    Attributes:
        codes: uint8 [N, K], each below ``len(levels)``.
        table: int8 [2**bits], level of every code.
        scale: fp16 [N, G], finite and positive, G = ceil(K / group).
        bits: 1, 2, 4 or 8.
        group: weights that share a scale along K (K itself for one scale a row).
        table_name: name in :mod:`lowbit.tables`, or "free".
    """

    codes: torch.Tensor
    table: torch.Tensor
    scale: torch.Tensor
    bits: int
    group: int
    table_name: str
    _cache: dict = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> QuantTensor:
        # The cache holds kernels' re-laid weights: a copy makes its own.
        return QuantTensor(
            self.codes.clone(), self.table.clone(), self.scale.clone(), self.bits, self.group, self.table_name
        )

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def levels(self) -> Table:
        """The level table, without the padding of ``table``."""
        if self.table_name == FREE:
            return free_table(tuple(self.table.tolist()), self.bits)
        return find_table(self.bits, self.table_name)

    @property
    def nbytes(self) -> int:
        """Bytes in a file: packed codes and scales."""
        return self.pack().numel() + 2 * self.scale.numel()

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K]; exact, since an fp16 scale times an int8 level fits in fp32."""
        k = self.shape[1]
        levels = self.table.float()[self.codes.long()]
        return levels * self.scale.float().repeat_interleave(self.group, dim=1)[:, :k]

    def pack(self) -> torch.Tensor:
        """Canonical packed codes, uint8 [N, bytes]; :meth:`unpack` is its lossless inverse."""
        if self.table_name == "ternary":
            return bitpack.pack_ternary(self.codes)
        return bitpack.pack_codes(self.codes, self.bits)

    @classmethod
    def unpack(cls, packed: torch.Tensor, scale: torch.Tensor, table: Table, k: int, group: int | None) -> QuantTensor:
        """Rebuild from canonical packed codes [N, bytes] and scales fp16 [N, G]."""
        if table.name == "ternary":
            codes = bitpack.unpack_ternary(packed, k)
        else:
            codes = bitpack.unpack_codes(packed, table.bits, k)
        if codes.numel() and int(codes.max()) >= len(table.levels):
            raise LowbitError(f"code {int(codes.max())} lies outside table {table.name!r}")
        return cls(codes, table_tensor(table), scale, table.bits, min(group or k, k), table.name)


def table_tensor(table: Table) -> torch.Tensor:
    """int8 [2**bits] levels of ``table`` as the kernels read them."""
    return torch.tensor(table.padded, dtype=torch.int8)


def quantize(
    w: torch.Tensor, bits: int, table: str | Sequence[int] | None = None, group: int | None = None
) -> QuantTensor:
    """Quantize ``w`` float [N, K] to ``bits`` with least-squares scales (DESIGN 3).

    Args:
        table: a name of :mod:`lowbit.tables`, "free" to learn int8 levels (2 and 4 bits), or the levels themselves.
        group: weights per scale along K, a multiple of 64; None for one scale a row.

    Raises:
        LowbitError: not a finite 2-D matrix, unknown bits, table or group.
    """
    if not isinstance(w, torch.Tensor) or w.ndim != 2 or not w.is_floating_point() or 0 in w.shape:
        raise LowbitError(f"quantize takes a non-empty float matrix [N, K], not {describe(w)}")
    w = w.detach().float().cpu()
    if not bool(torch.isfinite(w).all()):
        raise LowbitError("quantize: the weight holds NaN or infinite values")
    check_group(group)
    if table == FREE:
        levels = _learn_levels(w, bits, group)
    elif table is None or isinstance(table, str):
        levels = find_table(bits, table)
    else:
        levels = free_table(table, bits)
    codes, scale = fit(w, levels, group)
    k = w.shape[1]
    return QuantTensor(codes, table_tensor(levels), scale, bits, min(group or k, k), levels.name)


def describe(w: object) -> str:
    """Shape and dtype of a tensor, or a type's name, for error messages."""
    return f"{list(w.shape)} {w.dtype}" if isinstance(w, torch.Tensor) else type(w).__name__


def check_group(group: int | None) -> None:
    """Raises LowbitError unless ``group`` is None or a positive multiple of 64."""
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group <= 0 or group % 64):
        raise LowbitError(f"group must be a positive multiple of 64, or absent for one scale a row, not {group!r}")


def fit(
    v: torch.Tensor,
    table: Table,
    group: int | None = None,
    weight: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    refine_only: bool = False,
    iterations: int = _ITERATIONS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares codes and fp16 scales of ``v`` fp32 [N, K].

    Minimises sum h * (v - s * level[code])^2 per scale by alternating least squares from several starts (DESIGN 3);
    binary and ternary with h = 1 have closed forms.

    Args:
        weight: h >= 0, broadcastable to [N, K] (a Fisher or Hessian diagonal); None for h = 1.
        start: previous scales [N, G], one more start, or the only one with ``refine_only`` (training's warm start).

    Returns:
        codes uint8 [N, K] and scale fp16 [N, G].
    """
    problem = _Problem(v, table, group, weight)
    if weight is None and table.name == "binary":
        best = problem.sum(problem.v.abs()) / problem.sum(problem.h)
    elif weight is None and table.name == "ternary":
        best = problem.ternary_scale()
    else:
        starts = [] if start is None else [problem.rows(start.float())]
        if not (refine_only and starts):
            starts += problem.starts()
        best = problem.alternate(starts, iterations)
    scale = round_scale(best)
    codes = problem.nearest(scale)
    n, k = v.shape
    return codes.view(n, -1)[:, :k].contiguous(), scale.view(n, -1).half()


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """fp32 scales rounded to fp16 values, kept finite and positive (an all-zero row gets the least fp16)."""
    return scale.clamp(_FP16_TINY, _FP16_MAX).half().float()


class _Problem:
    """One least-squares problem per scale: v and h viewed as [rows, group], padded with h = 0."""

    def __init__(self, v: torch.Tensor, table: Table, group: int | None, weight: torch.Tensor | None):
        n, k = v.shape
        self.table, self.group = table, min(group or k, k)
        self.levels = torch.tensor(table.levels, dtype=torch.float32, device=v.device)
        pad = (0, -k % self.group)
        h = torch.ones_like(v) if weight is None else weight.float().expand(n, k).clone()
        self.v = torch.nn.functional.pad(v, pad).view(-1, self.group)
        self.h = torch.nn.functional.pad(h, pad).view(-1, self.group)

    @staticmethod
    def sum(x: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True)

    @staticmethod
    def rows(scale: torch.Tensor) -> torch.Tensor:
        return scale.reshape(-1, 1)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """uint8 code of the nearest level of every v / scale."""
        return nearest_codes(self.v / scale, self.table)

    def starts(self) -> list[torch.Tensor]:
        count = self.sum(self.h > 0).clamp(min=1)
        rms = (self.sum(torch.where(self.h > 0, self.v, 0).square()) / count).sqrt()
        unit = _GAUSSIAN_SCALE.get(self.table.name)
        largest = self.v.abs().amax(1, keepdim=True)
        top = max(abs(level) for level in self.table.levels)
        scales = [largest * f / top for f in _MAX_GRID]
        return [rms * unit, *scales] if unit else [rms * 2.5 / top, *scales]

    def alternate(self, starts: list[torch.Tensor], iterations: int) -> torch.Tensor:
        """The best scale over all starts; each start descends until no code changes."""
        best, best_loss = None, None
        for scale in starts:
            scale = scale.clamp(_FP16_TINY, _FP16_MAX)
            codes = self.nearest(scale)
            for _ in range(iterations):
                scale = self.least_squares(codes, scale)
                changed, codes = codes, self.nearest(scale)
                if torch.equal(changed, codes):
                    break
            loss = self.loss(scale)
            if best is None:
                best, best_loss = scale, loss
            else:
                better = loss < best_loss
                best, best_loss = torch.where(better, scale, best), torch.where(better, loss, best_loss)
        return best

    def least_squares(self, codes: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """s = sum(h t v) / sum(h t^2); where that is 0 / 0 or not positive, the previous scale stands."""
        ht = self.levels[codes.int()] * self.h
        numerator = self.sum(ht * self.v)
        denominator = self.sum(ht * self.levels[codes.int()])
        scale = numerator / denominator
        return torch.where((denominator > 0) & (numerator > 0), scale, previous)

    def loss(self, scale: torch.Tensor) -> torch.Tensor:
        error = self.v - scale * self.levels[self.nearest(scale).int()]
        return self.sum(self.h * error.square())

    def ternary_scale(self) -> torch.Tensor:
        """Closed form for h = 1: keep the m largest |v|, s their mean, m maximising (sum of them)^2 / m."""
        size = self.v.abs().sort(dim=1, descending=True).values.double()
        prefix = size.cumsum(1)
        count = torch.arange(1, self.group + 1, dtype=torch.float64, device=size.device)
        m = (prefix.square() / count).argmax(1, keepdim=True)
        return (prefix.gather(1, m) / (m + 1)).float()


def nearest_codes(units: torch.Tensor, table: Table) -> torch.Tensor:
    """uint8 code of the level nearest to every element of ``units`` (weights divided by their scale)."""
    top = len(table.levels) - 1
    # int8 is symmetric: its level -128 is never produced.
    bottom = 1 if table.name == "int8" else 0
    if table.affine:
        a, b = table.affine
        return ((units - b) / a).round_().clamp_(bottom, top).to(torch.uint8)
    levels = torch.tensor(table.levels, dtype=torch.float32, device=units.device)
    return torch.bucketize(units.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _learn_levels(w: torch.Tensor, bits: int, group: int | None, rounds: int = 8) -> Table:
    """Lloyd's algorithm on weights divided by their scale: int8 levels shared by the whole matrix."""
    n = 2**bits
    free_table(tuple(range(n)), bits)  # rejects widths without a free table
    quantiles = torch.linspace(0.5 / n, 1 - 0.5 / n, n)
    units = torch.special.ndtri(quantiles)
    table = _integer_levels(units, bits)
    k = w.shape[1]
    w = w.clamp(-127 * _FP16_MAX, 127 * _FP16_MAX)  # beyond what a scale can reach, and sums of s * w stay finite
    for _ in range(rounds):
        codes, scale = fit(w, table, group, iterations=4)
        s = scale.float().repeat_interleave(min(group or k, k), dim=1)[:, :k]
        index = codes.flatten().long()
        numerator = torch.zeros(n).index_add_(0, index, (s * w).flatten())
        denominator = torch.zeros(n).index_add_(0, index, s.square().flatten())
        current = torch.tensor(table.levels, dtype=torch.float32)
        table = _integer_levels(torch.where(denominator > 0, numerator / denominator, current), bits)
    return table


def _integer_levels(units: torch.Tensor, bits: int) -> Table:
    """Ascending int8 levels proportional to ``units``, the largest magnitude at 127, equal neighbours pushed apart."""
    levels = (units / units.abs().max() * 127).round().int().sort().values.tolist()
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    excess = max(0, levels[-1] - 127)
    return free_table(tuple(v - excess for v in levels), bits)
