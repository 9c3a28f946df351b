"""The level tables of DESIGN section 3: which integers a code of 1, 2, 4 or 8 bits can stand for.

A weight is ``scale * level[code]``. Where ``level = a * code + b`` (``Table.affine``) a kernel multiplies codes
directly and corrects once per output; the other tables need a look-up.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lowbit.errors import LowbitError

BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Table:
    """``levels[code]`` for every valid code, ascending. ``len(levels) < 2**bits`` where a code is unused (ternary)."""

    name: str
    bits: int
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise LowbitError(f"table {self.name!r}: bits must be one of {BITS}, not {self.bits}")
        if not 2 <= len(self.levels) <= 2**self.bits:
            raise LowbitError(f"table {self.name!r}: {len(self.levels)} levels do not fit in {self.bits} bits")
        if any(not -128 <= v <= 127 for v in self.levels):
            raise LowbitError(f"table {self.name!r}: levels must be int8")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise LowbitError(f"table {self.name!r}: levels must ascend strictly")

    @cached_property
    def affine(self) -> tuple[int, int] | None:
        """``(a, b)`` with ``level = a * code + b`` for every valid code, or None for a look-up table."""
        a, b = self.levels[1] - self.levels[0], self.levels[0]
        return (a, b) if all(v == a * c + b for c, v in enumerate(self.levels)) else None

    @property
    def padded(self) -> tuple[int, ...]:
        """``2**bits`` levels for the kernels; an unused code repeats the affine continuation, or 0."""
        missing = range(len(self.levels), 2**self.bits)
        if self.affine:
            a, b = self.affine
            return self.levels + tuple(a * c + b for c in missing)
        return self.levels + tuple(0 for _ in missing)

    @property
    def effective_bits(self) -> float:
        return effective_bits(self.bits, self.name)


def effective_bits(bits: int, table: str) -> float:
    """Bits a weight takes in a file: ternary codes are stored five to a byte (DESIGN section 4)."""
    return 1.6 if table == "ternary" else float(bits)


def _signed_powers(n: int) -> tuple[int, ...]:
    positive = [2**i for i in range(n)]
    return (*(-p for p in reversed(positive)), 0, *positive)


TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table("binary", 1, (-1, 1)),
        Table("ternary", 2, (-1, 0, 1)),
        Table("midrise2", 2, (-3, -1, 1, 3)),
        # The papers' tied tables: zero and signed powers of two; at 2 bits one negative level more than positive
        # ones, so that all four codes are used.
        Table("pow2_2", 2, (-2, -1, 0, 1)),
        Table("midrise4", 4, tuple(range(-15, 16, 2))),
        Table("pow2_4", 4, _signed_powers(7)),
        # Code 0 (level -128) is never produced, so that the levels are symmetric: -127 ... 127.
        Table("int8", 8, tuple(range(-128, 128))),
    )
}
FREE = "free"  # a matrix's own learned levels: not in TABLES, but wherever a table is named
FREE_BITS = (2, 4)
DEFAULT_TABLE = {1: "binary", 2: "midrise2", 4: "midrise4", 8: "int8"}


def find_table(bits: int, name: str | None = None) -> Table:
    """The named table, or the default of ``bits``; "pow2" picks the variant of the bit width.

    Raises:
        LowbitError: unknown name, a bit width outside {1, 2, 4, 8}, or a table of another width.
    """
    if type(bits) is not int or bits not in BITS:  # True == 1 and 2.0 == 2 are no bit widths
        raise LowbitError(f"bits must be one of 1, 2, 4, 8, not {bits!r}")
    if name is None:
        name = DEFAULT_TABLE[bits]
    if name == "pow2":
        name = f"pow2_{bits}"
    if not isinstance(name, str) or name not in TABLES:
        raise LowbitError(f"unknown table {name!r}; known tables: {', '.join(sorted(TABLES))}, or free levels")
    if TABLES[name].bits != bits:
        raise LowbitError(f"table {name!r} has {TABLES[name].bits} bits, not {bits}")
    return TABLES[name]


def table_name(bits: int, name: str | None = None) -> str:
    """What :func:`find_table` finds by name, or "free" where the width has free levels. Raises as it does."""
    if name == FREE and type(bits) is int and bits in BITS:
        if bits not in FREE_BITS:
            raise LowbitError(f"a free table has 2 or 4 bits, not {bits!r}")
        return FREE
    return find_table(bits, name).name


def free_table(levels: Sequence[int], bits: int) -> Table:
    """A table of 2**bits learned int8 levels (2 or 4 bits), as stored in a file under the name "free".

    Raises:
        LowbitError: another width, or levels that are not 2**bits ascending int8 integers.
    """
    if type(bits) is not int or bits not in FREE_BITS:
        raise LowbitError(f"a free table has 2 or 4 bits, not {bits!r}")
    try:
        values = tuple(operator.index(v) for v in levels)
    except TypeError:
        raise LowbitError(f"a free table has integer levels, not {levels!r}") from None
    if len(values) != 2**bits:
        raise LowbitError(f"a free table of {bits} bits has {2**bits} levels, not {len(values)}")
    return Table(FREE, bits, values)
