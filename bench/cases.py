"""What is measured: the grid, and the matrices, activations and checks of a cell."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from peers import relative_error

from lowbit import linear
from lowbit.ops import PackedWeight
from lowbit.quantize import QuantTensor, table_tensor
from lowbit.tables import find_table

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
SHAPES = ((512, 512), (2048, 512), (512, 2048), (10000, 512), (4096, 4096), (11008, 4096), (1000, 777))
BITS = (1, 2, 4, 8)
COLD_ROWS = (1, 4, 16)
COLD_BYTES = 700_000_000  # of all copies of a matrix together: past a last cache of 480 MiB
COLD_MIN_BYTES = 250_000  # smaller matrices take too many copies, and live in a cache in practice
TOLERANCE = {"int8": 2e-2, "exact": 2e-5}


@dataclass(frozen=True)
class Cell:
    """One measurement of y[M, N] = x[M, K] W^T."""

    n: int
    k: int
    bits: int
    m: int
    cold: bool = False
    isa: str | None = None  # None: the best
    group: int | None = None
    table: str | None = None
    compute: str = "int8"

    @property
    def id(self) -> str:
        more = [self.isa, self.group and f"g{self.group}", self.table, self.compute if self.compute != "int8" else None]
        parts = [f"{self.n}x{self.k}", f"{self.bits}b", f"M{self.m}", "cold" if self.cold else "hot"]
        return "-".join(parts + [str(p) for p in more if p])

    @property
    def plain(self) -> bool:
        return (self.isa, self.group, self.table, self.compute) == (None, None, None, "int8")

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k


def grid(quick: bool) -> list[Cell]:
    """The suite; neighbours share their matrices. ``quick``: a twelfth of it, every kind of cell."""
    shapes, rows, bits = (((512, 512), (4096, 4096)), (1, 8, 256), (1, 4)) if quick else (SHAPES, ROWS, BITS)
    cells = []
    for n, k in shapes:
        for b in bits:
            cells += [Cell(n, k, b, m) for m in rows]
            if n * k * b // 8 >= COLD_MIN_BYTES:
                cells += [Cell(n, k, b, m, cold=True) for m in COLD_ROWS if m in rows]
    return cells


def variants(quick: bool, isas: list[str]) -> list[Cell]:
    """What the acceptance table asks beyond the grid: other instruction sets, groups, look-up tables, `exact`."""
    bits = (4,) if quick else BITS
    cells = [Cell(4096, 4096, 4, 1, cold=True, compute="exact")]
    for b in bits:
        cells += [Cell(4096, 4096, b, m, group=128) for m in (1, 256)]
        if b in (2, 4):
            cells += [Cell(4096, 4096, b, m, table="pow2") for m in (1, 256)]
        for isa in ("avx2", "avx512", "neon", "scalar"):
            if isa in isas and isa != isas[-1]:
                cells += [Cell(4096, 4096, b, 1, cold=True, isa=isa)]
            if isa in ("avx2", "avx512") and isa in isas:
                cells += [Cell(n, k, b, 256, isa=isa) for n, k in ((4096, 4096), (2048, 512), (512, 2048))]
    if not quick:  # time(M) between the grid's rows
        cells += [Cell(4096, 4096, b, m) for b in BITS for m in range(2, 17) if m not in ROWS]
    return cells


@lru_cache(maxsize=2)  # a variant and its plain sibling
def matrix(n: int, k: int, bits: int, group: int | None, table: str | None) -> tuple[PackedWeight, torch.Tensor]:
    """A random matrix, prepacked, and dequantized to fp32 [N, K]."""
    gen = torch.Generator().manual_seed(0)
    levels = find_table(bits, table)
    codes = torch.randint(0, len(levels.levels), (n, k), generator=gen, dtype=torch.uint8)
    scale = (torch.rand(n, -(-k // (group or k)), generator=gen) + 0.1).half()
    q = QuantTensor(codes, table_tensor(levels), scale, bits, group or k, levels.name)
    return PackedWeight.from_quant_tensor(q), q.dequantize()


def activations(cell: Cell) -> torch.Tensor:
    return torch.randn(cell.m, cell.k, generator=torch.Generator().manual_seed(cell.m))


def check(cell: Cell, weight: PackedWeight, x: torch.Tensor, w: torch.Tensor) -> None:
    error = relative_error(linear(x, weight, compute=cell.compute), x, w)
    assert error < TOLERANCE[cell.compute], f"{cell.id}: wrong before it was timed: error {error:.3g} of |x| |w|"


def copies(weight: PackedWeight) -> list[PackedWeight]:
    """So many copies that a walk over all of them leaves nothing in any cache."""
    count = -(-COLD_BYTES // weight.nbytes)
    return [weight, *(copy.deepcopy(weight) for _ in range(count - 1))]
