"""Pictures of a table: bytes against perplexity, bits of every matrix, predicted against measured increase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.files import atomic_path
from lowbit.tools import cli
from lowbit.tools.search.choices import CHOICES

# Plans of one budget share a colour; controls are hollow.
_GROUPS = (
    ("full precision", "k", "*", lambda key: key.startswith("fp32")),
    ("searched", "C0", "o", lambda key: key.split("-")[0] in ("hessian", "kl", "nas")),
    ("uniform", "C1", "s", lambda key: key.startswith("uniform")),
    ("manual", "C2", "D", lambda key: key == "manual"),
    ("random, inverse", "C3", "x", lambda key: key.split("-")[0] in ("random", "inverse")),
    ("other training", "C4", "v", lambda key: True),
)


def draw(result: Mapping[str, Any], target: Path) -> list[Path]:
    """Write TARGET.png, TARGET-bits.png and, where increases were measured, TARGET-sensitivity.png."""
    import matplotlib

    matplotlib.use("Agg")
    paths = [target.with_suffix(".png"), target.with_name(f"{target.name}-bits.png")]
    pareto(result["rows"], paths[0])
    heat_map(result["rows"], paths[1])
    if checks := {m: result["search"][m] for m in ("hessian", "kl") if "check" in result["search"][m]}:
        paths.append(target.with_name(f"{target.name}-sensitivity.png"))
        scatter(checks, paths[2])
    return paths


def pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """File bytes (logarithmic) against test perplexity, with the front of rows that no other beats in both."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    figure, axis = plt.subplots(figsize=(8, 5))
    left = list(rows)
    for name, colour, marker, belongs in _GROUPS:
        group, left = [r for r in left if belongs(r["key"])], [r for r in left if not belongs(r["key"])]
        if group:
            x, y = [r["bytes"] for r in group], [r["test_ppl"] for r in group]
            error = [[r["test_ppl"] - r["test_low"] for r in group], [r["test_high"] - r["test_ppl"] for r in group]]
            axis.errorbar(x, y, error, fmt=marker, color=colour, ms=7, lw=0.5, alpha=0.8, label=name)
    best = front(rows)
    axis.plot([r["bytes"] for r in best], [r["test_ppl"] for r in best], "-", color="gray", lw=1, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="model file, bytes", ylabel="test perplexity")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: cli.format_bytes(nbytes)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    _save(figure, path)


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that no other row beats in bytes and perplexity at once, by bytes."""
    out: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["bytes"], r["test_ppl"])):
        if not out or row["test_ppl"] < out[-1]["test_ppl"]:
            out.append(row)
    return out


def heat_map(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Precision of every matrix (columns) by plan (rows); the plans that differ between matrices, each once."""
    import matplotlib.pyplot as plt

    plans: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in rows:
        if "matrices" in row and len(set(row["matrices"].values())) > 1:
            plans.setdefault(tuple(row["matrices"].values()), row)
    names, order = list(CHOICES), list(plans.values())
    matrices = list(order[0]["matrices"]) if order else []
    figure, axis = plt.subplots(figsize=(2.5 + 0.3 * len(matrices), 1.5 + 0.32 * len(order)))
    if order:
        values = [[names.index(row["matrices"][m]) for m in matrices] for row in order]
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=len(names) - 1, aspect="auto")
        bar = figure.colorbar(image, ax=axis, ticks=range(len(names)))
        bar.ax.set_yticklabels(names)
    axis.set_yticks(range(len(order)), [row["title"].split(",")[0] for row in order], fontsize=8)
    axis.set_xticks(range(len(matrices)), matrices, rotation=90, fontsize=7)
    _save(figure, path)


def scatter(checks: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Predicted cost of each matrix against the measured increase and against its even part, by metric."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(checks), figsize=(5.5 * len(checks), 4.5), squeeze=False)
    for axis, (metric, sens) in zip(axes[0], checks.items()):
        check, rows = sens["check"], sens["matrices"]
        predicted = [rows[m]["omega"][check["choice"]] for m in rows]
        for part, marker, rho in (("nll", "o", "spearman"), ("even", "x", "spearman_even")):
            measured = [check["measured"][m][part] for m in rows]
            error = [check["measured"][m][f"{part}_standard_error"] for m in rows]
            name = "measured" if part == "nll" else "its even part"
            axis.errorbar(predicted, measured, error, fmt=marker, ms=5, lw=0.5, label=f"{name}, ρ = {check[rho]:.2f}")
        least = min(p for p in predicted if p > 0) if any(p > 0 for p in predicted) else 1e-6
        axis.plot([least, max(predicted)], [least, max(predicted)], "-", color="gray", lw=1, zorder=0)
        axis.set_xscale("symlog", linthresh=least)
        axis.set_yscale("symlog", linthresh=least)
        axis.set(title=f"{metric}, {check['choice']} bits", xlabel="predicted ΔNLL", ylabel="ΔNLL of one matrix")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
