"""A table of results as Markdown, and its picture: bytes against quality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import atomic_path, read_lines, write_text
from lowbit.tools import cli

# (heading, key of a row, format); a column stands in the table if any row has its key.
COLUMNS = (
    ("model", "title", "{}"),
    ("bytes", "bytes", "{:,}"),
    ("times smaller", "ratio", "{:.2f}"),
    ("mean bits", "mean_bits", "{:.2f}"),
    ("valid PPL", "valid_ppl", "{:.2f}"),
    ("test PPL", "test_ppl", "{:.2f}"),
    ("dev WER %", "dev_rescored_wer", "{:.2f}"),
    ("test WER %", "test_rescored_wer", "{:.2f}"),
    ("sentences/s", "sentences_per_second", "{:,.0f}"),
    ("utterances/s", "utterances_per_second", "{:,.0f}"),
)


Columns = Sequence[tuple[str, str, str]]


def table(rows: Sequence[dict[str, Any]], columns: Columns = COLUMNS) -> list[list[str]]:
    """Header and cells; an absent value is an en dash."""
    columns = [c for c in columns if any(c[1] in row for row in rows)]
    cells = [[f.format(row[key]) if row.get(key) is not None else "–" for _, key, f in columns] for row in rows]
    return [[heading for heading, _, _ in columns], *cells]


def markdown(rows: Sequence[dict[str, Any]], columns: Columns = COLUMNS) -> str:
    """The table, with the first-pass and oracle WER and the tests against them below it."""
    header, *body = table(rows, columns)
    align = ["---"] + ["---:"] * (len(header) - 1)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, align, *body)]
    if "test_first_pass_wer" in rows[0]:
        r = rows[0]
        lines += ["", f"First pass {r['test_first_pass_wer']:.2f} % WER, oracle {r['test_oracle_wer']:.2f} % (test)."]
        for row in rows:
            if "against_first_pass" in row:
                lines.append(
                    f"- {row['title']}: {_test(row, 'first_pass', 'first pass')}; {_test(row, 'fp32', 'fp32')}."
                )
    return "\n".join(lines) + "\n"


def _test(row: dict[str, Any], key: str, name: str) -> str:
    t = row[f"against_{key}"]
    if t["low"] == t["high"] == 0:
        return f"identical to {name}"
    p = t["mapsswe_p"]
    shown = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{t['wer_difference']:+.2f} [{t['low']:+.2f}, {t['high']:+.2f}] against {name} (MAPSSWE {shown})"


def replace_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of section ``name`` in a Markdown file.

    Raises:
        LowbitError: the file has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    content = "\n".join(read_lines(path)) + "\n"
    if begin not in content or end not in content:
        raise LowbitError(f"{path}: no section between {begin} and {end}")
    head, rest = content.split(begin, 1)
    write_text(path, f"{head}{begin}\n{text}{end}{rest.split(end, 1)[1]}")


def picture(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Bytes (logarithmic) against perplexity and, where there is one, WER; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    quality = [("test_ppl" if "test_ppl" in rows[0] else "valid_ppl", "perplexity")]
    if "test_rescored_wer" in rows[0]:
        quality.append(("test_rescored_wer", "test WER %"))
    figure, axes = plt.subplots(1, len(quality), figsize=(5.5 * len(quality), 4), squeeze=False)
    for axis, (key, label) in zip(axes[0], quality, strict=True):
        for row, marker in zip(rows, itertools.cycle("osD^vP*")):
            size = cli.format_bytes(row["bytes"])
            axis.plot(row["bytes"], row[key], marker, ms=9, alpha=0.8, ls="none", label=f"{row['title']}, {size}")
        if key == "test_rescored_wer":
            for name, style in (("first_pass", "--"), ("oracle", ":")):
                axis.axhline(rows[0][f"test_{name}_wer"], color="gray", ls=style, lw=1, label=name.replace("_", " "))
        else:
            axis.set_yscale("log")
            # Perplexities of one table seldom span a decade: plain numbers instead of powers of ten.
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.set(xscale="log", xlabel="model file, bytes", ylabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: cli.format_bytes(nbytes)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.margins(0.15)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 * math.ceil(len(labels) / 2), 1, 1))  # room for the legend's lines
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
