"""Level tables: DESIGN section 3's list, and what a table refuses."""

from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.tables import BITS, DEFAULT_TABLE, TABLES, Table, find_table, free_table


def test_levels_are_those_of_the_design():
    assert TABLES["binary"].levels == (-1, 1)
    assert TABLES["ternary"].levels == (-1, 0, 1)
    assert TABLES["midrise2"].levels == (-3, -1, 1, 3)
    assert TABLES["midrise4"].levels == tuple(range(-15, 16, 2))
    assert TABLES["int8"].levels == tuple(c - 128 for c in range(256))
    assert all(v == 0 or abs(v) & (abs(v) - 1) == 0 for b in (2, 4) for v in TABLES[f"pow2_{b}"].levels)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.name)
def test_affine_tables_are_affine_and_the_others_are_not(table: Table):
    if table.name == "pow2_4":
        assert table.affine is None
        assert len(table.padded) == 16 and table.padded[-1] == 0
        return
    a, b = table.affine
    assert table.levels == tuple(a * c + b for c in range(len(table.levels)))
    assert table.padded == tuple(a * c + b for c in range(2**table.bits))


def test_affine_coefficients_that_kernels_rely_on():
    assert TABLES["binary"].affine == (2, -1)
    assert TABLES["ternary"].affine == (1, -1)
    assert TABLES["midrise2"].affine == (2, -3)
    assert TABLES["midrise4"].affine == (2, -15)
    assert TABLES["int8"].affine == (1, -128)


def test_effective_bits_count_ternary_as_stored():
    assert [TABLES[DEFAULT_TABLE[b]].effective_bits for b in BITS] == [1.0, 2.0, 4.0, 8.0]
    assert TABLES["ternary"].effective_bits == 1.6


def test_find_table():
    assert find_table(2).name == "midrise2"
    assert find_table(2, "pow2").name == "pow2_2" and find_table(4, "pow2").name == "pow2_4"


@pytest.mark.parametrize(
    ("bits", "name", "reason"),
    [
        (3, None, "1, 2, 4, 8"),
        (True, None, "1, 2, 4, 8"),
        (2.0, None, "1, 2, 4, 8"),
        ("2", None, "1, 2, 4, 8"),
        (2, "midrise4", "has 4 bits"),
        (2, "nf4", "unknown table"),
        (2, "", "unknown table"),
        (2, ["binary"], "unknown table"),
        (8, "pow2", "unknown table"),
    ],
)
def test_find_table_refuses(bits, name, reason):
    with pytest.raises(LowbitError, match=reason):
        find_table(bits, name)


@pytest.mark.parametrize(
    ("levels", "bits", "reason"),
    [
        ((-1, 0, 1), 2, "4 levels"),
        ((-1, 0, 1, 1), 2, "ascend"),
        ((-129, 0, 1, 2), 2, "int8"),
        ((-1.5, 0, 1, 2), 2, "integer"),
        (None, 2, "integer"),
        ("abcd", 2, "integer"),
        ((0, 1), 1, "2 or 4 bits"),
        (tuple(range(256)), 8, "2 or 4 bits"),
    ],
)
def test_free_table_refuses(levels, bits, reason):
    with pytest.raises(LowbitError, match=reason):
        free_table(levels, bits)


@pytest.mark.parametrize(("bits", "levels"), [(3, (0, 1)), (1, (0,)), (1, (0, 1, 2)), (2, (1, 0)), (8, (-200, 0))])
def test_table_refuses(bits, levels):
    with pytest.raises(LowbitError):
        Table("x", bits, levels)
