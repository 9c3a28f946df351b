"""`lowbit rescore`: reorder the N-best lists of a speech recogniser by a language model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from lowbit.tools import cli
from lowbit.tools.engine_options import add_engine_options, add_model, load_engine


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "rescore",
        "lowbit rescore model.lowbit --nbest dev.jsonl --out dev.out.jsonl --tune --weights weights.json\n"
        "lowbit rescore model.lowbit --nbest test.jsonl --out test.out.jsonl --weights weights.json",
        'Lists are JSON lines {"id", "ref"?, "hyps": [{"text", "am"?}]}, best first. The new score is\n'
        "am + lm_weight * log P + length_bonus * words; a list without am scores uses minus its rank, and says so.\n"
        "A list's own lm scores are kept, and not used in this version.\n"
        "--tune finds the weights on this list's references and saves them to the file of --weights.",
    )
    add_model(p)
    p.add_argument("--nbest", required=True, metavar="LIST.jsonl")
    p.add_argument("--out", required=True, metavar="OUT.jsonl")
    p.add_argument("--weights", metavar="W.json", help="weights to use, or to write with --tune")
    p.add_argument("--tune", action="store_true", help="tune the weights on this list (needs references)")
    p.add_argument("--lm-weight", type=float, metavar="A", help="weight of log P, instead of --weights")
    p.add_argument("--length-bonus", type=float, metavar="B", help="score of every word, with --lm-weight (default 0)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the random directions of --tune")
    add_engine_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.nbest import read_nbest, write_nbest
    from lowbit.rescore import RescoringReport, rescore_stream

    check_arguments(args)
    lm = load_engine(args)
    weights = tuned_weights(args, lm) if args.tune else given_weights(args)
    report = RescoringReport()
    start = time.perf_counter()
    done = rescore_stream(lm, read_nbest(args.nbest), weights, report, args.nbest)
    write_nbest(args.out, cli.track(done, "rescore", unit="utterance"))
    seconds = time.perf_counter() - start
    if report.first_pass == "rank":
        print(f"lowbit rescore: {args.nbest} has no am scores: minus the rank stands for them", file=sys.stderr)
    if args.tune and args.weights:
        weights.save(args.weights)
    speed = report.utterances / seconds
    print_result(args, report.to_dict(), weights, speed)
    used = {"lm_weight": weights.lm_weight, "length_bonus": weights.length_bonus, "tuned_on": weights.tuned_on}
    timing = {"seconds": seconds, "utterances_per_second": speed}
    return report.to_dict() | timing | {"weights": used, "out": args.out, "engine": lm.describe()}


def check_arguments(args: argparse.Namespace) -> None:
    """Exactly one source of weights, and folders that exist: found out before the work, not after it."""
    from lowbit.errors import LowbitError
    from lowbit.files import check_writable

    if args.tune and args.lm_weight is not None:
        raise LowbitError("--tune finds the weights: leave --lm-weight out")
    if not args.tune and (args.weights is None) is (args.lm_weight is None):
        raise LowbitError("give the weights once: --weights FILE, --lm-weight A, or --tune")
    if args.length_bonus is not None and args.lm_weight is None:
        raise LowbitError("--length-bonus goes with --lm-weight")
    for path in (args.out, args.weights if args.tune else None):
        if path:
            check_writable(path)


def given_weights(args: argparse.Namespace) -> Any:
    """From a file, or by hand."""
    from lowbit.rescore import Weights

    if args.weights:
        return Weights.load(args.weights)
    return Weights(args.lm_weight, args.length_bonus or 0.0)


def tuned_weights(args: argparse.Namespace, lm: Any) -> Any:
    """Tune on the whole list, which is held in memory."""
    from lowbit.nbest import read_nbest
    from lowbit.rescore import tune_weights

    lists = list(read_nbest(args.nbest))
    with cli.Progress("tune", len(lists), "utterance") as bar:
        return tune_weights(lm, lists, args.nbest, args.seed, bar.advance)


def print_result(args: argparse.Namespace, report: dict[str, Any], weights: Any, speed: float) -> None:
    console = cli.console(args)
    if "rescored_wer" in report:
        names = ("first_pass", "rescored", "oracle")
        rates = [f"{name.replace('_', ' ')} {report[f'{name}_wer']:.2f}" for name in names]
        console.print("WER %: " + ", ".join(rates))
    console.print(f"lm_weight {weights.lm_weight:.4g}, length_bonus {weights.length_bonus:.4g}"
                  + (" (tuned on this list)" if args.tune else ""))  # fmt: skip
    share = report["oov"] / max(1, report["words"])
    counts = f"{report['utterances']:,} utterances, {report['hypotheses']:,} hypotheses"
    console.print(f"{counts}, {speed:,.0f} utterances/s")
    console.print(f"{report['oov']:,} of {report['words']:,} words ({share:.2%}) unknown, scored as <unk>")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
