"""The table as Markdown: rows, and the verdicts that they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from lowbit.tools.cli import format_seconds
from lowbit.tools.results import markdown
from lowbit.tools.table_parts.rows import EQUAL_BYTES, SEARCHED

COLUMNS = (
    ("model", "title", "{}"),
    ("bytes", "bytes", "{:,}"),
    ("× smaller", "ratio", "{:.2f}"),
    ("bits", "mean_bits", "{:.2f}"),
    ("seeds", "n_seeds", "{}"),
    ("valid PPL", "valid_ppl", "{:.2f}"),
    ("test PPL", "test", "{}"),
    ("ΔNLL", "delta", "{}"),
    ("≤ +0.5 %?", "verdict", "{}"),
    ("training", "training", "{}"),
)


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row."""
    cells = dict(row) | {"n_seeds": len(row["seeds"])}
    cells["test"] = f"{row['test_ppl']:.2f} [{row['test_low']:.2f}, {row['test_high']:.2f}]"
    if against := row.get("test_against_fp32"):
        cells["delta"] = f"{against['delta']:+.4f} [{against['low']:+.4f}, {against['high']:+.4f}]"
        cells["verdict"] = "yes" if against["non_inferior"] else "no"
    times = [s for s in row["seconds"] if s is not None]
    cells["training"] = format_seconds(mean(times)) if times else None
    return cells


def report(result: Mapping[str, Any]) -> str:
    """The table, and below it what the searches had to show."""
    rows = {row["key"]: row for row in result["rows"]}
    text = markdown([shown(row) for row in result["rows"]], COLUMNS)
    lines = [
        "",
        "Brackets: 95 % paired block bootstrap over the text. ΔNLL: nats a token against full precision of the same",
        "seeds, on test. \"≤ +0.5 %?\": one-sided 95 % non-inferiority at half a percent of perplexity.",
        "",
        *_verdicts(result, rows),
        *_correlations(result["search"]),
        *_trials(result, rows),
    ]  # fmt: skip
    return text + "\n".join(lines) + "\n"


def _verdicts(result: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    best, uniform = rows[result["best"]], rows["uniform-2"]
    drawn = [row for key, row in rows.items() if key.startswith("random-")]
    lines = [
        f"- Best searched plan by validation: {best['title']}, test PPL {best['test_ppl']:.2f} at"
        f" {best['bytes']:,} bytes; uniform 2 bits {uniform['test_ppl']:.2f} at {uniform['bytes']:,} bytes."
    ]
    equal = rows[EQUAL_BYTES]
    lines.append(f"- {equal['title']}: {equal['test_ppl']:.2f} at {equal['bytes']:,} bytes.")
    if drawn:
        average = mean(row["test_ppl"] for row in drawn)
        lines.append(f"- Mean of {len(drawn)} random plans of the same budget: {average:.2f}.")
    searched = ", ".join(f"{rows[key]['title']} {rows[key]['test_ppl']:.2f}" for key in SEARCHED)
    others = ", ".join(f"{rows[key]['title'].split(', ')[-1]} {rows[key]['test_ppl']:.2f}"
                       for key in ("ste-only", "admm-only", "post-training"))  # fmt: skip
    lines.append(f"- Searches: {searched}. The Hessian's plan trained otherwise: {others}.")
    wrong = [row["title"] for row in rows.values() if row.get("predicted_bytes", row["bytes"]) != row["bytes"]]
    agree = "agree to the byte in every row" if not wrong else f"differ in {', '.join(wrong)}"
    lines.append(f"- Predicted and packed sizes {agree}.")
    return lines


def _correlations(search: Mapping[str, Any]) -> list[str]:
    lines = []
    for metric in ("hessian", "kl"):
        if check := search[metric].get("check"):
            lines.append(
                f"- Spearman's ρ of predicted ({metric}) and measured ΔNLL, one matrix at a time at"
                f" {check['choice']} bits: {check['spearman']:.3f}; with the part of ΔNLL that is even in the"
                f" rounding error: {check['spearman_even']:.3f}."
            )
    return lines


def _trials(result: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What else was tried, beside the row that it would have changed."""
    if not result["trials"]:
        return []
    tried: list[dict[str, Any]] = [{"title": "as in the table", "valid_ppl": rows["hessian"]["valid_ppl"]}]
    tried += [row | {"options": " ".join(row["options"])} for row in result["trials"]]
    columns = (("tried", "title", "{}"), ("options", "options", "`{}`"), ("valid PPL", "valid_ppl", "{:.2f}"))
    heading = "The Hessian's plan trained with other options, on validation text alone:"
    return ["", heading, "", *markdown(tried, columns).splitlines()]
