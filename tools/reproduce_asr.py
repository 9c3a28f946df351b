"""Make the language models of a speech corpus and rescore with them: the WER tables of docs/RESULTS.md.

Rows: the first pass; a trigram; a one-layer fp32 model; the fp32 model; the same in mixed precision, about as large as
the one-layer one; and the last two interpolated with the trigram. Weights are tuned on the development list, or
cross-validated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.tools import cli
from lowbit.tools.asr_recipes import RECIPES

GIVEN = {
    "fp": "full-precision checkpoint", "shallow": "one-layer full-precision checkpoint", "plan": "precision plan",
    "packed": "mixed-precision model", "ngram": "ARPA file",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "reproduce_asr",
        "lowbit reproduce-asr --corpus atis --data data/atis --out runs/asr-atis --docs docs\n"
        "lowbit reproduce-asr --corpus l2 --data data/l2 --out runs/asr-l2 --fp fp.safetensors",
        "DIR holds train and valid text and the lists dev.jsonl and test.jsonl (L2: dev.jsonl, cross-validated by\n"
        "speaker). Every stage resumes; the same command goes on after an interruption. The trigram is IRSTLM's.",
    )
    p.add_argument("--corpus", required=True, choices=sorted(RECIPES))
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--out", required=True, metavar="DIR", help="models, logs and results")
    p.add_argument(
        "--docs", metavar="DIR", help="also write results/asr-CORPUS.json and .png here, and into RESULTS.md"
    )
    p.add_argument("--ratio", type=float, default=16.0, metavar="R", help="of the mixed-precision model (default 16)")
    for name, what in GIVEN.items():
        p.add_argument(f"--{name}", metavar="FILE", help=f"use this {what} instead of making one")
    p.add_argument("--restart", action="store_true", help="run every stage again")
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.errors import LowbitError
    from lowbit.tools.asr_experiment import AsrExperiment
    from lowbit.tools.asr_results import markdown, write_section
    from lowbit.tools.pipeline import machine

    if not Path(args.out).resolve().parent.is_dir():
        raise LowbitError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist")
    given = {name: path for name in GIVEN if (path := getattr(args, name))}
    if absent := [path for path in given.values() if not Path(path).is_file()]:
        raise LowbitError(f"{absent[0]}: no such file")
    experiment = AsrExperiment(args.data, args.corpus, args.out, args.ratio, given, args.restart)
    rows = experiment.run()
    name = f"asr-{args.corpus}"
    table = markdown(rows, experiment.recipe.folds)
    result = {
        "command": f"lowbit reproduce-asr --corpus {args.corpus} --data {args.data} --out {args.out}", "given": given,
        "corpus": args.corpus, "rows": rows, "machine": machine(), "commands": experiment.pipeline.commands(),
    }  # fmt: skip
    write(Path(args.out) / "results", result)
    if args.docs:
        (Path(args.docs) / "results").mkdir(parents=True, exist_ok=True)
        write(Path(args.docs) / "results" / name, result)
        heading = f"{args.corpus.upper()} (word error rates)"
        write_section(Path(args.docs) / "RESULTS.md", name, heading, f"{table}\n![{name}](results/{name}.png)\n")
    cli.console(args).print(table)
    return result


def write(target: Path, result: dict[str, Any]) -> None:
    from lowbit.files import write_json
    from lowbit.tools.asr_results import picture

    write_json(target.with_suffix(".json"), cli.finite(result))
    picture(result["rows"], target.with_suffix(".png"), result["corpus"].upper())


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
