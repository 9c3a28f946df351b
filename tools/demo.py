"""The whole pipeline in five minutes, on text that every machine has: the documentation of the running Python.

Trains a small language model, rounds it to 2 bits, trains it into a mixed 1/2/4-bit plan by ADMM, packs it, proves
that the packed file is what was trained, writes a line, and rescores the N-best lists of a simulated recogniser.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.files import read_lines, write_json, write_text
from lowbit.nbest import write_nbest
from lowbit.tools import cli
from lowbit.tools.demo_parts import checks
from lowbit.tools.demo_parts.channel import Channel, ChannelOptions, simulate
from lowbit.tools.demo_parts.corpus import write_corpus
from lowbit.tools.experiment import Experiment
from lowbit.tools.pipeline import Pipeline
from lowbit.tools.results import markdown, picture, table
from lowbit.tools.training.config import TrainConfig
from lowbit.vocab import Vocab

CONFIG = "demo"
LISTS = {"dev": 300, "test": 400}  # utterances
UTTERANCE_WORDS = (5, 20)  # lists grow with the sentence, and nobody says forty words in a breath
SPLITS = ("train", "valid", "dev", "test")
PROMPT = "return the"
SPEED_SENTENCES = 600
NOT_SHOWN = ("valid_ppl", "dev_rescored_wer", "utterances_per_second")  # one text, one list and one speed a table
NOTES = (
    "The N-best lists are SIMULATED by a noisy channel, no speech: their error rates compare these models only.",
    "ADMM starts from the full-precision model and trains as many epochs again, so it may end below its perplexity.",
)


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "demo",
        "lowbit demo\nlowbit demo --out /tmp/demo --restart",
        "Ends with a table and a picture, also written to DIR as results.{md,json,png}. The N-best lists are\n"
        "simulated: their error rates compare the models with one another, not with any recogniser.\n"
        "A second run repeats nothing that is done; an interrupted one goes on.",
    )
    p.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of all files (default: runs/demo)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--restart", action="store_true", help="do everything again")
    return p


def prepare_text(folder: Path, restart: bool) -> dict[str, Any]:
    """The corpus, and the lists of the simulated recogniser; returns the words of each split."""
    pipeline = Pipeline(folder, restart)
    paths = {split: pipeline.path(f"{split}.txt") for split in SPLITS}
    source = f"text of the documentation of Python {platform.python_version()} -> {folder}"
    words = pipeline.once("corpus", source, lambda: write_corpus(folder), [], list(paths.values()))
    lists = [pipeline.path(f"{split}.jsonl") for split in LISTS]
    inputs = [paths["train"], *(paths[split] for split in LISTS)]
    pipeline.once("lists", f"SIMULATED N-best lists ({ChannelOptions()})", lambda: write_lists(folder), inputs, lists)
    return {split: words[split] for split in SPLITS}


def write_lists(folder: Path) -> dict[str, int]:
    """dev.jsonl and test.jsonl: what the simulated recogniser hears of the first held-out sentences."""
    config, train = TrainConfig.find(CONFIG), read_lines(folder / "train.txt")
    counts = Counter(word for line in train for word in line.split())
    channel = Channel(Vocab.build(train, config.min_count, config.max_vocab), counts)
    shortest, longest = UTTERANCE_WORDS
    for split, wanted in LISTS.items():
        spoken = [s for s in read_lines(folder / f"{split}.txt") if shortest <= len(s.split()) <= longest]
        write_nbest(folder / f"{split}.jsonl", simulate(channel, spoken[:wanted], split))
    return dict(LISTS)


def run_models(args: argparse.Namespace, data: Path) -> tuple[list[dict[str, Any]], Pipeline]:
    """Train, pack, evaluate and rescore: one row a model."""
    experiment = Experiment(data, CONFIG, args.out, args.restart, control=False)
    return experiment.run(), experiment.pipeline


def prove(pipeline: Pipeline, rows: list[dict[str, Any]], data: Path) -> dict[str, Any]:
    """The checks of the packed model, a generated line, and the speed of every model (added to ``rows``)."""
    trained, packed = pipeline.path("admm.safetensors"), pipeline.path("admm.lowbit")
    sentences = read_lines(data / "test.txt")
    models = [pipeline.path(f"{name}.lowbit") if name else pipeline.path("fp.safetensors") for name in MODEL_FILES]

    def work() -> dict[str, Any]:
        lm = lowbit.load(packed)
        return {
            "identical": checks.same_codes(trained, packed),
            "largest_logprob_difference": checks.same_scores(trained, packed, sentences[:200]),
            "engine": lm.describe(),
            "line": lm.generate(PROMPT, 20, temperature=0.7, seed=1),
            "sentences_per_second": checks.sentences_per_second(models, sentences[:SPEED_SENTENCES]),
        }

    inputs = [trained, *models, str(data / "test.txt")]
    result = pipeline.once("checks", f"packed = trained? {packed} against {trained}", work, inputs, [])
    for row, speed in zip(rows, result["sentences_per_second"], strict=True):
        row["sentences_per_second"] = speed
    return result


# Of the rows of Experiment, in order; "" is the full-precision checkpoint.
MODEL_FILES = ("", "ptq-uniform2", "ptq-mixed", "admm")


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from rich.table import Table

    console, done, rows = cli.console(args), result["checks"], result["rows"]
    same, engine = done["identical"], done["engine"]
    console.print(
        f"\npacked = trained: {same['matrices']} matrices, {same['weights']:,} weights and {same['vector_entries']:,}"
        f" vector entries identical to the last bit;\n                  log P of a sentence within"
        f" {done['largest_logprob_difference']:.1g} of the torch model (exact activations)"
    )
    console.print(f"engine: {', '.join(f'{k} {v}' for k, v in engine.items() if k != 'path')}")
    console.print(f"a line from the packed model: {done['line']}", markup=False)
    header, *cells = table(rows)
    shown = Table(title="\nlowbit demo: documentation of this Python", title_justify="left")
    for i, heading in enumerate(header):
        shown.add_column(heading, justify="right" if i else "left")
    for row in cells:
        shown.add_row(*row)
    console.print(shown)
    first, oracle = rows[0]["test_first_pass_wer"], rows[0]["test_oracle_wer"]
    console.print(f"WER of the lists: first pass {first:.2f} %, oracle {oracle:.2f} %")
    console.print("\n".join(NOTES))
    console.print(f"{args.out}/results.md, .json and .png; {cli.format_seconds(result['seconds'])} this time")


def body(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    out = Path(args.out)
    if not out.resolve().parent.parent.is_dir():
        raise LowbitError(f"--out {args.out}: the folder {out.parent.parent} does not exist")
    if args.threads is not None:
        lowbit.set_threads(args.threads)  # checks the number
        torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    words = prepare_text(out / "data", args.restart)
    rows, pipeline = run_models(args, out / "data")
    done = prove(pipeline, rows, out / "data")
    for row in rows:
        for name in NOT_SHOWN:
            row.pop(name, None)
    result = {
        "rows": rows, "checks": done, "words": words, "simulated_lists": True, "channel": vars(ChannelOptions()),
        "commands": pipeline.commands(), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    write_json(out / "results.json", cli.finite(result))
    write_text(out / "results.md", markdown(rows) + "\n" + "\n".join(NOTES) + "\n")
    picture(rows, out / "results.png")
    show(args, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
