"""The table of a speech corpus as Markdown, and its picture: bytes against word error rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.files import PathLike, atomic_path, read_lines, write_text
from lowbit.tools import cli
from lowbit.tools.results import replace_section

HEADER = ("system", "bytes", "times smaller", "valid PPL", "WER %", "95 % interval")


def markdown(rows: Sequence[dict[str, Any]], folds: int) -> str:
    """Table, oracle, and one line a comparison."""
    titles = {row["key"]: row["title"] for row in rows}
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    for row in rows:
        low, high = row["interval"]
        cells = [
            row["title"], _cell(row, "bytes", "{:,}"), _cell(row, "ratio", "{:.2f}"), _cell(row, "valid_ppl", "{:.2f}"),
            f"{row['wer']:.2f}", f"{low:.2f} – {high:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    where = f"cross-validated in {folds} parts, speakers kept together" if folds else "weights tuned on dev"
    first = rows[0]
    lines += ["", f"{first['utterances']:,} utterances, {first['ref_words']:,} words; oracle "
              f"{rows[-1]['oracle_wer']:.2f} %; {where}.", ""]  # fmt: skip
    for row in rows:
        for other, test in row["against"].items():
            low, high = test["interval"]
            lines.append(
                f"- {row['title']} against {titles[other]}: {test['difference']:+.2f} [{low:+.2f}, {high:+.2f}], "
                f"MAPSSWE {p_value(test['mapsswe_p'])}"
            )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "–"


def p_value(p: float) -> str:
    """A probability as tables print it."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def picture(rows: Sequence[dict[str, Any]], path: PathLike, title: str) -> None:
    """Bytes (logarithmic) against WER with its interval; first pass, n-gram and oracle as lines; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    by_key = {row["key"]: row for row in rows}
    figure, axis = plt.subplots(figsize=(7.5, 4.5))
    points = [(key, by_key[key]["bytes"]) for key in ("shallow", "fp32", "mixed")]
    # Two models take the room of both.
    points += [(f"{key}+ngram", by_key[key]["bytes"] + by_key["ngram"]["bytes"]) for key in ("fp32", "mixed")]
    for (key, nbytes), marker in zip(points, "osDsD"):
        row = by_key[key]
        error = [[max(0.0, row["wer"] - row["interval"][0])], [max(0.0, row["interval"][1] - row["wer"])]]
        fill = "none" if key.endswith("+ngram") else None
        axis.errorbar(nbytes, row["wer"], error, fmt=marker, ms=8, mfc=fill, capsize=3, alpha=0.8,
                      label=f"{row['title']}, {cli.format_bytes(nbytes)}")  # fmt: skip
    lines = (("first pass", by_key["first"]["wer"], "--"), ("trigram", by_key["ngram"]["wer"], "-."),
             ("oracle", rows[-1]["oracle_wer"], ":"))  # fmt: skip
    for name, value, style in lines:
        axis.axhline(value, color="gray", ls=style, lw=1, label=f"{name}, {value:.2f} %")
    axis.set(xscale="log", xlabel="bytes of the language models' files", ylabel="WER %", title=title)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: cli.format_bytes(nbytes)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.margins(0.15)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def write_section(path: PathLike, name: str, heading: str, text: str) -> None:
    """Put ``text`` between the markers of section ``name``; a file without them gets heading and markers at its end."""
    path = Path(path)
    lines = read_lines(path)
    if f"<!-- begin {name} -->" not in lines:
        lines += ["", f"## {heading}", "", f"<!-- begin {name} -->", f"<!-- end {name} -->"]
        write_text(path, "\n".join(lines) + "\n")
    replace_section(path, name, text)
