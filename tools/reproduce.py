"""Run the experiments whose numbers docs/RESULTS.md reports: one corpus, every row of its table.

``small`` and ``paper`` are the tables of precision search (``tools/table_parts``): every way to choose precisions,
every control. The others make one table of a corpus. Its rows: the full-precision model; the same trained again as long
as the low-bit one was (the control for its extra steps); post-training rounding at 2 bits and the mixed plan; ADMM at
the mixed plan. All share data, vocabulary, batches and seed. Rescoring weights are tuned on dev.jsonl for every row by
itself; test is read once.
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
from lowbit.tools.pipeline import Pipeline, machine
from lowbit.tools.results import markdown, picture, replace_section
from lowbit.tools.table_parts.config import TableConfig, tables
from lowbit.tools.table_parts.estimate import stages
from lowbit.tools.table_parts.jobs import run_shared
from lowbit.tools.table_parts.pictures import draw
from lowbit.tools.table_parts.report import report
from lowbit.tools.table_parts.run import Table


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "reproduce",
        "lowbit reproduce --data data/ptb --config small --out runs/table --docs docs\n"
        "lowbit reproduce --data data/ptb --config paper --out runs/paper --dry-run\n"
        "lowbit reproduce --data data/ptb --config ptb-small --out runs/ptb --docs docs\n"
        "lowbit reproduce --data data/atis --config atis --out runs/atis --docs docs",
        "DIR holds train and valid text, and may hold a test text and N-best lists dev.jsonl and test.jsonl.\n"
        "Every stage resumes; the same command goes on after an interruption.",
    )
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--config", required=True, metavar="NAME|FILE",
                   help=f"a corpus ({', '.join(sorted(RECIPES))}), or a table of precision search"
                   f" ({', '.join(tables())}, or a JSON file)")  # fmt: skip
    p.add_argument("--out", required=True, metavar="DIR", help="models, logs and results")
    p.add_argument(
        "--docs", metavar="DIR", help="also write results/CONFIG.json and .png here, and the table into RESULTS.md"
    )
    p.add_argument("--skip-control", action="store_true", help="leave out a corpus's retrained full-precision model")
    p.add_argument("--dry-run", action="store_true", help="only print a table's stages, steps and memory")
    p.add_argument("--jobs", type=int, default=1, metavar="N",
                   help="processes that share a table's stages, each with its part of the CPU threads")  # fmt: skip
    p.add_argument("--restart", action="store_true", help="run every stage again")
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(args.out).resolve().parent.is_dir():
        raise LowbitError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist")
    if args.config in RECIPES:
        if args.jobs != 1:
            raise LowbitError(f"--jobs: for the tables {', '.join(tables())}, not for {args.config}")
        return corpus(args)
    if args.skip_control:
        raise LowbitError(f"--skip-control: the rows of table {args.config} are in its configuration")
    known = (*sorted(RECIPES), *tables())
    if args.config not in known and not Path(args.config).is_file():
        raise LowbitError(f"--config {args.config}: known are {', '.join(known)}, or a JSON file of a table")
    config = TableConfig.find(args.config)
    return dry_run(args, config) if args.dry_run else search_table(args, config)


def corpus(args: argparse.Namespace) -> dict[str, Any]:
    """The table of a corpus."""
    if args.dry_run:
        raise LowbitError(f"--dry-run: for the tables {', '.join(tables())}, not for {args.config}")
    experiment = Experiment(args.data, args.config, args.out, args.restart, control=not args.skip_control)
    rows = experiment.run()
    result = _provenance(args, experiment.pipeline) | {"rows": rows}
    for target in _targets(args, args.config):
        _write(target, result)
    publish(args, args.config, markdown(rows), [f"{args.config}.png"])
    return result


def search_table(args: argparse.Namespace, config: TableConfig) -> dict[str, Any]:
    """A table of precision search."""
    name = f"table-{Path(args.config).stem}"
    if args.jobs != 1:
        run_shared(args.data, config, args.out, args.restart, args.jobs)
    table = Table(args.data, config, args.out, args.restart and args.jobs == 1)
    found = table.run()
    result = _provenance(args, table.pipeline) | found
    for target in _targets(args, name):
        write_json(target.with_suffix(".json"), cli.finite(result))
        pictures = draw(result, target)
    publish(args, name, report(result), [path.name for path in pictures])
    return result


def dry_run(args: argparse.Namespace, config: TableConfig) -> dict[str, Any]:
    """Print what a table would run."""
    result, console = stages(args.data, config), cli.console(args)
    console.print(f"{result['parameters']:,} parameters, {result['steps_an_epoch']:,} steps an epoch")
    for stage in result["stages"]:
        time = "" if stage["seconds"] is None else f"  about {cli.format_seconds(stage['seconds'])}"
        console.print(f"{stage['key']:32} {stage['stage']:12} {stage['steps']:>9,} steps{time}")
    for name, nbytes in result["memory"].items():
        console.print(f"memory of {name:12} about {cli.format_bytes(nbytes)}")
    if result["seconds"]:
        console.print(f"all stages: about {result['seconds'] / 3600:.1f} h where a training step takes"
                      f" {config.seconds_per_step} s")  # fmt: skip
    return result


def _provenance(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    command = f"lowbit reproduce --data {args.data} --config {args.config} --out {args.out}"
    return {"command": command, "config": args.config, "machine": machine(), "commands": pipeline.commands()}


def _targets(args: argparse.Namespace, name: str) -> list[Path]:
    """Where results go, without suffix: the folder of outputs and, if asked for, of the documentation."""
    targets = [Path(args.out) / "results"]
    if args.docs:
        (Path(args.docs) / "results").mkdir(parents=True, exist_ok=True)
        targets.append(Path(args.docs) / "results" / name)
    return targets


def publish(args: argparse.Namespace, name: str, text: str, pictures: Sequence[str]) -> None:
    """Print the table, and put it into its section of docs/RESULTS.md if asked for."""
    if args.docs:
        images = "\n".join(f"![{Path(p).stem}](results/{p})" for p in pictures)
        replace_section(Path(args.docs) / "RESULTS.md", name, f"{text}\n{images}\n")
    cli.console(args).print(text, markup=False)


def _write(target: Path, result: dict[str, Any]) -> None:
    write_json(target.with_suffix(".json"), cli.finite(result))
    picture(result["rows"], target.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
