"""What the kernels were asked to reach, line by line, beside what a run reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
MISSING = "not measured"


class Run:
    """Finds cells and costs of a report."""

    def __init__(self, data: dict[str, Any]):
        self.isa, self.cells, self.costs = data["run"]["isa"], data["cells"], {c["id"]: c for c in data["costs"]}

    def cell(self, n: int, k: int, bits: int, m: int, cold: bool = False, **more: Any) -> Row | None:
        want = {"n": n, "k": k, "bits": bits, "m": m, "cold": cold, "isa": self.isa, "group": None, "table": None,
                "compute": "int8"} | more  # fmt: skip
        return next((c for c in self.cells if all(c[key] == value for key, value in want.items())), None)


def _ratio(cell: Row, peer: str) -> float | None:
    return cell["peers"][peer]["ratio"][1] if peer in cell["peers"] else None


def one_stream(cell: Row) -> float | None:
    """Percent of what each core reads as one stream: the measure by which the figures were asked for."""
    return cell.get("percent_one_stream")


def _line(
    what: str, wanted: float, unit: str, cells: list[Row | None], value: Callable[[Row], float | None]
) -> list[str]:
    """The least favourable of some cells against what is wanted of each."""
    values = [value(c) for c in cells if c is not None]
    if not cells or len(values) < len(cells) or any(v is None for v in values):
        return [what, f"{wanted:g}{unit}", MISSING, ""]
    worst = min(values)  # type: ignore[type-var]
    return [what, f"{wanted:g}{unit}", f"{worst:.3g}{unit}", "yes" if worst >= wanted else "no"]


def rows(data: dict[str, Any]) -> list[list[str]]:
    """A table, header first: what, wanted at least, reached, whether that is enough."""
    run = Run(data)
    lines = [["what", "wanted", "reached", "enough"], *_decoding(run), *_middle(run), *_rescoring(run), *_variants(run)]
    return lines + _costs(run)


def _decoding(run: Run) -> list[list[str]]:
    lines = []
    for bits, share, times in ((8, 93, 3.6), (4, 92, 7.2), (2, 85, 13), (1, 75, 22)):
        cell = [run.cell(4096, 4096, bits, 1, cold=True)]
        what = f"GEMV 4096 x 4096 cold, {bits} bits"
        lines.append(_line(f"{what}: share of what one stream a core reads", share, " %", cell, one_stream))
        lines.append(_line(f"{what}: share of the fastest way to read", share, " %", cell, lambda c: c["percent"]))
        lines.append(_line(f"{what}: over torch fp32", times, " times", cell, lambda c: _ratio(c, "torch fp32")))
    for n, k in ((512, 512), (2048, 512)):
        cells = [run.cell(n, k, bits, 1) for bits in (1, 2, 4, 8)]
        for peer in ("torch int4", "ONNX Runtime"):
            what = f"GEMV {n} x {k} hot, every width: over {peer}"
            lines.append(_line(what, 1, " times", cells, lambda c, peer=peer: _ratio(c, peer)))
    return lines


def _middle(run: Run) -> list[list[str]]:
    """time(M), M = 2 to 16."""
    lines = []
    for bits in (1, 2, 4, 8):
        cells = [run.cell(4096, 4096, bits, m) for m in range(2, 17)]
        one = run.cell(4096, 4096, bits, 1)
        what = f"4096 x 4096 hot, {bits} bits, M = 2 to 16"
        lines.append(_line(f"{what}: M time(1) over time(M)", 1, " times", [*cells, one],
                           lambda c, one=one: c["m"] * one["us"] / c["us"] if one else None))  # fmt: skip
        lines.append(_line(f"{what}: over torch bf16", 1, " times", cells, lambda c: _ratio(c, "torch bf16")))
    return lines


def _rescoring(run: Run) -> list[list[str]]:
    cells = [run.cell(4096, 4096, bits, 256) for bits in (1, 2, 4, 8)]
    what = "GEMM M = 256, 4096 x 4096, every width"
    lines = [_line(what, 7.5, " TOP/s", cells, lambda c: c["tops"])]
    for peer, times in (("torch fp32", 18), ("torch bf16", 3), ("torch int_mm", 2)):
        lines.append(_line(f"{what}: over {peer}", times, " times", cells, lambda c, peer=peer: _ratio(c, peer)))
    for n, k in ((2048, 512), (512, 2048)):
        cells = [run.cell(n, k, bits, 256) for bits in (1, 2, 4, 8)]
        lines.append(_line(f"GEMM M = 256, {n} x {k}, every width", 6, " TOP/s", cells, lambda c: c["tops"]))
    for n, k in ((4096, 4096), (2048, 512), (512, 2048)):
        cells = [run.cell(n, k, bits, 256, isa="avx512") for bits in (1, 2, 4, 8)]
        what = f"the same with LOWBIT_ISA=avx512, {n} x {k}: share of VNNI peak"
        lines.append(_line(what, 70, " %", cells, lambda c: c["percent"]))
    return lines


def _variants(run: Run) -> list[list[str]]:
    def plain(cell: Row) -> float | None:
        return _ratio(cell, "lowbit plain")

    lines = []
    for bits in (4, 8):
        cell = [run.cell(4096, 4096, bits, 1, cold=True, isa="avx2")]
        what = f"AVX2 GEMV 4096 x 4096 cold, {bits} bits: share of the fastest way to read"
        lines.append(_line(what, 75, " %", cell, lambda c: c["percent"]))
    for m in (1, 256):
        for what, more, widths in (("group 128", {"group": 128}, (1, 2, 4, 8)), ("look-up", {"table": "pow2"}, (2, 4))):
            cells = [run.cell(4096, 4096, bits, m, **more) for bits in widths]
            lines.append(_line(f"{what}, M = {m}: plain's time over its own", 0.87, " times", cells, plain))
    cell = [run.cell(4096, 4096, 4, 1, cold=True, compute="exact")]
    what = "exact, M = 1, 4 bits, cold: over torch fp32"
    return [*lines, _line(what, 4, " times", cell, lambda c: _ratio(c, "torch fp32"))]


def _costs(run: Run) -> list[list[str]]:
    overhead, prepack = run.costs.get("overhead"), run.costs.get("prepack")
    lines = [["call overhead over the native kernel", "at most 4 us", MISSING, ""],
             ["prepack 135 M weights, 4 bits", "at most 0.4 s", MISSING, ""],
             ["extra memory meanwhile, in matrices", "at most 1", MISSING, ""]]  # fmt: skip
    if overhead:
        lines[0][2:] = [f"{overhead['us']:.2f} us", "yes" if overhead["us"] <= 4 else "no"]
    if prepack:
        seconds = prepack["seconds"] * 135e6 / prepack["weights"]
        matrices = prepack["extra_nbytes"] / prepack["matrix_nbytes"]
        lines[1][2:] = [f"{seconds:.2f} s", "yes" if seconds <= 0.4 else "no"]
        lines[2][2:] = [f"{matrices:.2f}", "yes" if matrices <= 1.05 else "no"]
    return lines
