"""Run the experiments whose numbers docs/RESULTS.md reports: one corpus, every row of its table.

Rows: the full-precision model; the same trained again as long as the low-bit one was (the control for its extra
steps); post-training rounding at 2 bits and at the mixed plan; ADMM at the mixed plan. All share data, vocabulary,
batches and seed. Rescoring weights are tuned on dev.jsonl for every row by itself; test is read once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import write_json
from lowbit.tools import cli
from lowbit.tools.experiment import RECIPES, Experiment
from lowbit.tools.pipeline import machine
from lowbit.tools.results import markdown, picture, replace_section


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "reproduce",
        "lowbit reproduce --data data/ptb --config ptb-small --out runs/ptb --docs docs\n"
        "lowbit reproduce --data data/atis --config atis --out runs/atis --docs docs",
        "DIR holds train and valid text, and may hold a test text and N-best lists dev.jsonl and test.jsonl.\n"
        "Every stage resumes; the same command goes on after an interruption.",
    )
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--config", required=True, choices=sorted(RECIPES))
    p.add_argument("--out", required=True, metavar="DIR", help="models, logs and results")
    p.add_argument(
        "--docs", metavar="DIR", help="also write results/CONFIG.json and .png here, and the table into RESULTS.md"
    )
    p.add_argument("--skip-control", action="store_true", help="leave out the retrained full-precision model")
    p.add_argument("--restart", action="store_true", help="run every stage again")
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(args.out).resolve().parent.is_dir():
        raise LowbitError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist")
    experiment = Experiment(args.data, args.config, args.out, args.restart, control=not args.skip_control)
    rows = experiment.run()
    command = f"lowbit reproduce --data {args.data} --config {args.config} --out {args.out}"
    result = {
        "command": command, "config": args.config, "rows": rows, "machine": machine(),
        "commands": experiment.pipeline.commands(),
    }  # fmt: skip
    _write(Path(args.out) / "results", result)
    if args.docs:
        (Path(args.docs) / "results").mkdir(parents=True, exist_ok=True)
        _write(Path(args.docs) / "results" / args.config, result)
        section = f"{markdown(rows)}\n![{args.config}](results/{args.config}.png)\n"
        replace_section(Path(args.docs) / "RESULTS.md", args.config, section)
    cli.console(args).print(markdown(rows))
    return result


def _write(target: Path, result: dict[str, Any]) -> None:
    write_json(target.with_suffix(".json"), cli.finite(result))
    picture(result["rows"], target.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
