"""The report of the kernel benchmarks: what `make bench` measured, beside this machine's ceilings and the peers.

python bench/report.py runs/bench/kernels.jsonl                 every cell as a table
python bench/report.py runs/bench/kernels.jsonl --docs docs     also results/kernels.{json,md,png} and KERNELS.md
python bench/report.py runs/bench/kernels.jsonl --docs docs --name zen5     another machine's, beside the first's
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import read_lines, write_json, write_text
from lowbit.tools import cli
from lowbit.tools.results import replace_section

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
METHOD = (
    "Percentages are of the roofline of the same run: the least time in which the bytes of weights, activations and "
    "outputs can be read (at the bandwidth measured for that working set) or the multiply-adds done (at the peak of "
    "the instruction set), whichever takes longer; cold and at M = 1, what a loop of reads takes in the same rounds. "
    "Ratios are their time over ours, medians of paired rounds."
)


def sibling(name: str):
    """A module of this folder, which is no package and not on sys.path under PYTHONSAFEPATH."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load(path: str | Path) -> dict[str, Any]:
    """The record of a run as {"run", "ceilings", "cells", "costs"}, cells with their rates and bounds.

    Raises:
        LowbitError: not a record, or one without a finished probe.
    """
    try:
        rows = [json.loads(line) for line in read_lines(path) if line]
    except ValueError as error:
        raise LowbitError(f"{path}: not a record of make bench: {error}") from None
    kinds = {kind: [r for r in rows if r.get("kind") == kind] for kind in ("run", "probe", "cell", "cost")}
    if len(kinds["run"]) != 1 or not kinds["probe"]:
        raise LowbitError(f"{path}: not a record of make bench: it has no run or no ceilings")
    ceilings = sibling("ceilings").Ceilings.from_runs(kinds["probe"])
    return {
        "run": kinds["run"][0],
        "ceilings": {
            "read": ceilings.read,
            "one_stream": ceilings.one_stream,
            "peak": ceilings.peak,
            "threads": ceilings.threads,
        },
        "cells": [evaluate(cell, ceilings) for cell in kinds["cell"]],
        "costs": kinds["cost"],
    }


def evaluate(cell: Row, ceilings: Any) -> Row:
    """The cell with GB/s of weights, TOP/s, and the share of its bound in percent."""
    seconds = cell["us"] / 1e6
    moved = cell["nbytes"] + 4 * cell["m"] * (cell["n"] + cell["k"])
    bound = ceilings.bound(moved, cell["operations"], moved * cell["copies"], cell["isa"])
    percent = 100 * bound.seconds / seconds
    one_stream = {"percent_one_stream": percent * ceilings.gain(moved * cell["copies"])} if bound.by == "read" else {}
    if cell.get("reads") and bound.by == "read":
        percent, one_stream["percent_one_stream"] = beside_reads(cell, moved)
    return cell | one_stream | {
        "gbps": cell["nbytes"] / seconds / 1e9, "tops": cell["operations"] / seconds / 1e12,
        "bound": bound.by, "percent": percent,
        "spread": 100 * (cell["us_high"] - cell["us_low"]) / cell["us"],
    }  # fmt: skip


def beside_reads(cell: Row, moved: int) -> tuple[float, float]:
    """Percent of the bandwidth met in the same rounds: of the fastest way to read, and of one stream a core."""
    shares = {name: 100 * ratio[1] * moved / cell["read_nbytes"] for name, ratio in cell["reads"].items()}
    return min(shares.values()), min(share for name, share in shares.items() if name.startswith("one stream"))


NOISY = 20  # percent between the quartiles


def noise(cells: Sequence[Row]) -> str:
    """How quiet the machine was: a sentence."""
    noisy = sum(c["spread"] > NOISY for c in cells)
    return f"In {noisy} of {len(cells)} cells the quartiles of our time lie more than {NOISY} % apart."


def peer_names(cells: Sequence[Row]) -> list[str]:
    """Peers of any cell; the plain kernel, which stands beside variants only, comes last."""
    names = dict.fromkeys(name for c in cells for name in (*c["absent"], *c["peers"]))
    return sorted(names, key=lambda name: (name == "lowbit plain", not name.startswith("torch"), name))


def ratio_text(cell: Row, name: str) -> str:
    return f"{cell['peers'][name]['ratio'][1]:.2f}" if name in cell["peers"] else "-"


def kind_of(cell: Row) -> str:
    """'4 bits, group 128' and what else is not the default."""
    more = [f"group {cell['group']}" if cell["group"] else "", cell["table"] or ""]
    more.append(cell["compute"] if cell["compute"] != "int8" else "")
    return ", ".join([f"{cell['bits']} bits", *(m for m in more if m)])


def table(cells: Sequence[Row]) -> list[list[str]]:
    """One row a cell, header first."""
    names = peer_names(cells)
    head = ["N x K", "M", "kind", "memory", "ISA", "us", "spread %", "GB/s", "TOP/s", "% of", "bound"]
    rows = [head + [f"{name} /" for name in names]]
    for c in cells:
        rows.append(
            [f"{c['n']} x {c['k']}", str(c["m"]), kind_of(c), "cold" if c["cold"] else "hot", c["isa"],
             f"{c['us']:.2f}" if c["us"] < 100 else f"{c['us']:.0f}", f"{c['spread']:.0f}", f"{c['gbps']:.1f}",
             f"{c['tops']:.3f}" if c["tops"] < 1 else f"{c['tops']:.2f}", f"{c['percent']:.0f}", c["bound"],
             *(ratio_text(c, name) for name in names)]
        )  # fmt: skip
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def section(data: dict[str, Any], stem: str) -> str:
    """What KERNELS.md shows: machine, acceptance table, decoding and rescoring; the rest is in results/stem.*."""
    run, cells = data["run"], data["cells"]
    read, peak = data["ceilings"]["read"], data["ceilings"]["peak"]
    plain = [c for c in cells if c["isa"] == run["isa"] and not (c["group"] or c["table"]) and c["compute"] == "int8"]
    bandwidths = ", ".join(f"{read[size] / 1e9:.0f} GB/s at {_size(size)}" for size in sorted(read)[::3])
    one_stream = f"{data['ceilings']['one_stream'][max(read)] / 1e9:.0f} GB/s"
    peaks = ", ".join(f"{name} {value / 1e12:.2f}" for name, value in peak.items())
    subset = " A quick subset." if run["quick"] else ""
    head = (
        f"`make bench` on {run['processor']}, {run['threads']} threads, {run['isa']}; torch {run['torch']}, "
        f"ONNX Runtime {run['onnxruntime'] or 'absent'}.{subset} {METHOD} "
        f"{noise(cells)}"
    )
    limits = f"Ceilings, both cores: reads {bandwidths} ({one_stream} where each core reads one stream); TOP/s {peaks}."
    return (
        f"{fill(head, 120)}\n\n{fill(limits, 120)}\n\n"
        "### What was asked\n\n" + markdown(sibling("acceptance").rows(data)) + "\n### Decoding, M = 1\n\n"
        + markdown(table([c for c in plain if c["m"] == 1])) + "\n### Rescoring, M = 256\n\n"
        + markdown(table([c for c in plain if c["m"] == 256]))
        + f"\nAll cells: [results/{stem}.md](results/{stem}.md); their JSON: "
        f"[results/{stem}.json](results/{stem}.json).\n\n![roofline](results/{stem}.png)\n"
    )  # fmt: skip


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def picture(data: dict[str, Any], path: Path) -> None:
    """The roofline: TOP/s over multiply-adds a byte of weights, for every bit width, with the measured roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    read, peak = data["ceilings"]["read"], data["ceilings"]["peak"]
    cells = [c for c in data["cells"] if c["isa"] == data["run"]["isa"] and c["compute"] == "int8"]
    x = [2.0**i for i in range(0, 15)]
    figure, axes = plt.subplots(figsize=(9, 6))
    for size, label in ((1 << 20, "1 MiB"), (1 << 25, "32 MiB"), (1 << 30, "1 GiB")):
        if size in read:
            top = max(peak.values(), default=1e12)
            roof = [min(v * read[size], top) / 1e12 for v in x]
            axes.plot(x, roof, linewidth=1, label=f"read, {label}: {read[size] / 1e9:.0f} GB/s")
    for name, value in peak.items():
        axes.axhline(value / 1e12, linewidth=0.8, linestyle=":", color="gray")
        axes.annotate(name, (x[0], value / 1e12), fontsize=8, va="bottom")
    for bits, mark in ((1, "o"), (2, "s"), (4, "^"), (8, "v")):
        for cold in (False, True):
            some = [c for c in cells if c["bits"] == bits and c["cold"] == cold]
            if some:
                axes.scatter(
                    [c["operations"] / c["nbytes"] for c in some], [c["tops"] for c in some], s=18, marker=mark,
                    facecolors="none" if cold else None, edgecolors="black" if cold else None, linewidths=0.6,
                    label=f"{bits} bits, {'cold' if cold else 'hot'}",
                )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="TOP/s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("record", help="what make bench wrote")
    p.add_argument("--docs", metavar="FOLDER", help="write results/kernels.* and the section of KERNELS.md there")
    p.add_argument("--name", metavar="CPU", help="with --docs: results/kernels-CPU.* and a section of their own")
    cli.add_common(p)
    args = p.parse_args(argv)
    return cli.guard("report", lambda: write(load(args.record), args))


def write(data: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(cli.finite(data), indent=1, allow_nan=False))
    else:
        print(
            markdown(table(data["cells"])), markdown(sibling("acceptance").rows(data)), noise(data["cells"]), sep="\n"
        )
    if args.docs:
        docs, suffix = Path(args.docs), f"-{args.name}" if args.name else ""
        results = docs / "results" / f"kernels{suffix}"
        write_json(results.with_suffix(".json"), cli.finite(data))
        write_text(results.with_suffix(".md"), "# Every cell of `make bench`\n\n" + markdown(table(data["cells"])))
        picture(data, results.with_suffix(".png"))
        replace_section(docs / "KERNELS.md", f"measured{suffix}", section(data, results.name))


if __name__ == "__main__":
    sys.exit(main())
