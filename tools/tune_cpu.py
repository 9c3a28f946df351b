"""Measure on this machine from how many rows the CPU kernels for many rows win, and keep it for later runs.

Both kernels of every instruction set and bit width are timed in turns at 1 to 128 rows, on two shapes. The crossover
kept is the one under which all these products together, each weighing the same, take least time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit import _C, tuning
from lowbit.errors import LowbitError
from lowbit.files import locked
from lowbit.ops import PackedWeight, available_isas, get_threads, linear, set_isa
from lowbit.tables import find_table
from lowbit.tools import cli
from lowbit.tools.timing import Effort, compare, quartiles

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 128)
SHAPES = ((2048, 512), (2048, 2048))
EFFORT = Effort(warm=0.002, sample=0.002, min_rounds=5, max_rounds=9, total=0.15)


def parser() -> argparse.ArgumentParser:
    p = cli.parser("tune_cpu", "lowbit tune-cpu --isa amx avx512", __doc__.split("\n\n")[1])
    p.add_argument(
        "--isa", nargs="+", metavar="NAME", help="instruction sets to measure (default: all of this machine)"
    )
    p.add_argument("--out", metavar="FILE", help=f"default: the user's cache folder, or {tuning.VARIABLE}")
    p.add_argument("--force", action="store_true", help="measure again what the file holds already")
    return p


def best_crossover(rows: Sequence[int], few: Sequence[float], many: Sequence[float]) -> int:
    """The rows from which the kernel for many should run: least sum of log times. few, many: seconds at each rows.

    MAX_ROWS, more than any call has, where the kernel for few wins throughout.
    """
    gain = [math.log(a / b) for a, b in zip(few, many, strict=True)]
    costs = [-sum(gain[i:]) for i in range(len(rows) + 1)]
    best = min(range(len(costs)), key=costs.__getitem__)
    return rows[best] if best < len(rows) else tuning.MAX_ROWS


def start(rows: int) -> str:
    """A crossover for people."""
    return f"from {rows} rows" if rows < tuning.MAX_ROWS else "never"


def weight_of(n: int, k: int, bits: int) -> PackedWeight:
    gen = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (n, k * bits // 8), generator=gen, dtype=torch.uint8)
    table = torch.tensor(find_table(bits).padded, dtype=torch.int8)
    return PackedWeight.from_canonical(packed, torch.ones(n, 1).half(), table, bits, k)


def times_at(m: int, weight: PackedWeight, isa: str) -> tuple[float, float]:
    """Seconds of a product of m rows with the kernel for few and with the one for many."""
    x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(m))

    def run(crossover: int):
        def call() -> None:
            _C.set_crossover(isa, weight.bits, crossover)
            linear(x, weight)

        return call

    times = compare({"few": run(tuning.MAX_ROWS), "many": run(1)}, EFFORT)
    return quartiles(times["few"])[1], quartiles(times["many"])[1]


def measure(isas: Sequence[str], bar: cli.Progress) -> tuple[tuning.Crossovers, list[dict[str, Any]]]:
    """Crossovers of the instruction sets, and every measurement behind them."""
    crossovers: tuning.Crossovers = {}
    measured = []
    for isa in isas:
        set_isa(isa)
        crossovers[isa] = {}
        for bits in tuning.BITS:
            before = _C.crossover(isa, bits)
            weights = [weight_of(n, k, bits) for n, k in SHAPES]
            times = []
            for m in ROWS:
                few, many = zip(*(times_at(m, weight, isa) for weight in weights))
                times.append((math.prod(few) ** (1 / len(few)), math.prod(many) ** (1 / len(many))))
                measured.append({"isa": isa, "bits": bits, "rows": m, "few_us": 1e6 * times[-1][0],
                                 "many_us": 1e6 * times[-1][1]})  # fmt: skip
                bar.advance(note=f"{isa}, {bits} bits, {m} rows")
            crossovers[isa][bits] = best_crossover(ROWS, *zip(*times))
            _C.set_crossover(isa, bits, before)
    return crossovers, measured


def body(args: argparse.Namespace) -> dict[str, Any]:
    isas = args.isa or available_isas()
    missing = [isa for isa in isas if isa not in available_isas()]
    if missing:
        raise LowbitError(f"this machine lacks {', '.join(missing)}; it has {', '.join(available_isas())}")
    path = Path(args.out) if args.out else tuning.chosen_path() or tuning.default_path()
    with locked(path):
        held = tuning.read(path) if path.exists() and not args.force else {}
        todo = [isa for isa in isas if isa not in held]
        measured: list[dict[str, Any]] = []
        if todo:
            try:
                with cli.Progress("tune_cpu", len(todo) * len(tuning.BITS) * len(ROWS), "product") as bar:
                    found, measured = measure(todo, bar)
            finally:
                set_isa(None)
            held |= found
            tuning.write(path, held, get_threads())
    out = cli.console(args)
    for isa, rows in held.items():
        out.print(f"{isa}: " + ", ".join(f"{bits} bits {start(n)}" for bits, n in sorted(rows.items())))
    out.print(f"{'kept in' if todo else 'measured before, in'} {path}", soft_wrap=True)
    return {"path": str(path), "threads": get_threads(), "crossovers": held, "measured": measured}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    raise SystemExit(main())
