"""`lowbit rescore`: reorder the N-best lists of a speech recogniser by a language model."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lowbit.tools import cli
from lowbit.tools.engine_options import add_engine_options, add_list_options, read_lists

DEFAULTS = {
    "length_bonus": 0,
    "unknown_weight": 0,
    "interpolation_weight": 1,
    "acoustic_weight": 1,
    "first_lm_weight": 0,
}
WEIGHTS = ("lm_weight", *DEFAULTS)


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "rescore",
        "lowbit rescore model.lowbit --nbest dev.jsonl --out dev.out.jsonl --tune --weights weights.json\n"
        "lowbit rescore model.lowbit --nbest test.jsonl --out test.out.jsonl --weights weights.json\n"
        "lowbit rescore model.lowbit --ngram 3gram.arpa --nbest kaldi_dir --out best.trn --weights weights.json",
        "The new score of a hypothesis is\n"
        "  acoustic_weight * am + first_lm_weight * lm + lm_weight * [w * log P + (1 - w) * log P_n-gram]\n"
        "  + length_bonus * words + unknown_weight * words outside the model's vocabulary\n"
        "where am and lm are the list's own; lists without am use minus the rank, and that is said. --tune finds the\n"
        "weights (but acoustic_weight, which is 1) with the fewest word errors on this list, by exact line searches,\n"
        "and saves them to the file of --weights; with --folds every part of the list is rescored by the weights\n"
        'tuned on all others. Lists are JSON lines {"id", "ref"?, "hyps": [{"text", "am"?, "lm"?}]}, a Kaldi\n'
        "n-best directory, mlm-scoring or ESPnet JSON, TSV, or Kaldi lattices; a file, .gz, or - for standard input.",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", nargs="?",
                   help="checkpoint (.safetensors) or packed model (.lowbit); optional with --ngram")  # fmt: skip
    p.add_argument("--nbest", required=True, metavar="LIST", help="lists to rescore")
    add_list_options(p)
    p.add_argument(
        "--out", metavar="OUT", help="rescored lists: .jsonl .json .tsv, - or --out-format; or .trn: the best"
    )
    p.add_argument("--out-format", metavar="F", help="jsonl, json, kaldi, tsv; text (id and words) or trn of the best")
    p.add_argument("--n-best-out", metavar="OUT", help="JSON lines of the lists, where --out holds the best only")
    p.add_argument("--keep", type=int, metavar="N", help="hypotheses that stay in a list (default: all)")
    p.add_argument("--ngram", metavar="ARPA", help="n-gram model, ARPA or kenlm's binary form")
    p.add_argument("--interpolation", choices=("log", "linear"), default="log", help="of --tune (default: log)")
    p.add_argument("--average-am", action="store_true", help="with --tune or --lm-weight: the list's am scores are "
                   "averages over the words of a hypothesis and its end")  # fmt: skip
    p.add_argument("--context", type=int, default=0, metavar="N", help="utterances of the same conversation to read "
                   "before each, as the first pass has them (default 0)")  # fmt: skip
    p.add_argument("--conversation", default="conv", metavar="FIELD", help="that names the conversation (default conv)")
    p.add_argument("--weights", metavar="W.json", help="weights to use, or to write with --tune")
    p.add_argument("--tune", action="store_true", help="tune the weights on this list (needs references)")
    p.add_argument("--hold", action="append", default=[], choices=("length_bonus", "unknown_weight", "first_lm_weight"),
                   help="a weight that --tune leaves at 0; may be given again")  # fmt: skip
    p.add_argument("--folds", type=int, metavar="K", help="of --tune: cross-validate in K parts")
    p.add_argument("--fold-by", metavar="FIELD", default="spk", help="whose values stay in one part (default: spk)")
    p.add_argument("--lm-weight", type=float, metavar="A", help="weights by hand, instead of --weights")
    for name, default in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        p.add_argument(flag, type=float, metavar="B", help=f"with --lm-weight (default {default})")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of --tune's random directions, and of the folds")
    add_engine_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    check_arguments(args)
    scorer = load_scorer(args)
    start = time.perf_counter()
    report, weights = tuned(args, scorer) if args.tune else applied(args, scorer)
    seconds = time.perf_counter() - start
    result = report.to_dict() | {"seconds": seconds, "utterances_per_second": report.utterances / seconds}
    if report.duration:
        result["real_time_factor"] = seconds / report.duration
    used = [{name: getattr(w, name) for name in WEIGHTS} | {"interpolation": w.interpolation} for w in weights]
    result |= {"weights": used[0] | {"tuned_on": weights[0].tuned_on}} if len(used) == 1 else {"fold_weights": used}
    print_result(args, result, used)
    engine = {} if scorer.lm is None else {"engine": scorer.lm.describe()}
    return result | {"out": args.out, "ngram": args.ngram, "context": args.context} | engine


def check_arguments(args: argparse.Namespace) -> None:
    """Exactly one source of weights, and folders that exist: found out before the work, not after it."""
    from lowbit.errors import LowbitError

    if args.model is None and args.ngram is None:
        raise LowbitError("give MODEL, --ngram or both")
    if args.out is None and args.n_best_out is None:
        raise LowbitError("say where the result goes: --out, --n-best-out or both")
    if args.tune and args.lm_weight is not None:
        raise LowbitError("--tune finds the weights: leave --lm-weight out")
    if not args.tune and (args.weights is None) is (args.lm_weight is None):
        raise LowbitError("give the weights once: --weights FILE, --lm-weight A, or --tune")
    for name in DEFAULTS:
        if getattr(args, name) is not None and args.lm_weight is None:
            raise LowbitError(f"--{name.replace('_', '-')} goes with --lm-weight")
    if args.folds is not None and (not args.tune or args.weights):
        raise LowbitError("--folds goes with --tune, and without --weights: every fold has its own")
    if args.keep is not None and args.keep < 1:
        raise LowbitError(f"--keep must be at least 1, not {args.keep}")
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    from lowbit.errors import LowbitError
    from lowbit.files import check_writable
    from lowbit.nbest import OUTPUT_FORMATS

    if args.out_format is not None and args.out_format not in OUTPUT_FORMATS:
        raise LowbitError(f"--out-format must be one of {', '.join(OUTPUT_FORMATS)}, not {args.out_format!r}")
    if args.json and "-" in (args.out, args.n_best_out):
        raise LowbitError("--json writes to standard output: let --out be a file")
    for path in (args.out, args.n_best_out, args.weights if args.tune else None):
        if path and path != "-":
            check_writable(path)


def load_scorer(args: argparse.Namespace) -> Any:
    from lowbit.rescore import Scorer
    from lowbit.tools.engine_options import load_engine

    ngram = None
    if args.ngram:
        from lowbit.ngram import NGram

        ngram = NGram(args.ngram)
    lm = None if args.model is None else load_engine(args)
    return Scorer(lm, ngram, args.context, args.conversation)


def applied(args: argparse.Namespace, scorer: Any) -> tuple[Any, list[Any]]:
    """Rescore the stream with given weights."""
    from lowbit.rescore import RescoringReport, rescore_stream
    from lowbit.weights import Weights

    if args.weights:
        weights = Weights.load(args.weights)
        check_models(args, weights)
    else:
        weights = Weights(**{n: v for n in WEIGHTS if (v := getattr(args, n)) is not None},
                          interpolation=args.interpolation, average_am=args.average_am)  # fmt: skip
    report = RescoringReport()
    done = rescore_stream(scorer, announced(args), weights, report, args.nbest, args.keep)
    write(args, cli.track(done, "rescore", unit="utterance"))
    return report, [weights]


def announced(args: argparse.Namespace) -> Iterator[Any]:
    """The lists; that they have no scores is said before the work, not after it."""
    for number, utterance in enumerate(read_lists(args, args.nbest)):
        if not number and not utterance.has_am:
            print(f"lowbit rescore: {args.nbest} has no am scores: minus the rank stands for them", file=sys.stderr)
        yield utterance


def check_models(args: argparse.Namespace, weights: Any) -> None:
    """Weights hold for the kinds of models that they were tuned with."""
    from lowbit.errors import LowbitError

    for option, given in (("model", args.model), ("ngram", args.ngram), ("context", args.context)):
        if option in weights.tuned_on and bool(weights.tuned_on[option]) is not bool(given):
            kind = "with" if weights.tuned_on[option] else "without"
            raise LowbitError(f"{args.weights}: these weights were tuned {kind} a {option}; tune again")


def tuned(args: argparse.Namespace, scorer: Any) -> tuple[Any, list[Any]]:
    """Tune on the whole list, which is held in memory, and rescore it."""
    from dataclasses import replace

    from lowbit.errors import check_seed
    from lowbit.rescore import RescoringReport, reordered
    from lowbit.tune_weights import cross_validate, fold_of, score_development, tune_weights
    from lowbit.weights import Weights

    check_seed(args.seed)
    fixed = Weights(0.0, interpolation=args.interpolation, average_am=args.average_am)
    with cli.Progress("score", unit="utterance") as bar:
        development, first_pass = score_development(scorer, announced(args), args.nbest, bar.advance)
    if args.folds:
        fold = fold_of([s.utterance for s in development], args.folds, args.fold_by, args.nbest, args.seed)
        with cli.Progress("tune", args.folds, "fold") as bar:
            done, report, weights = cross_validate(
                scorer, development, first_pass, fold, args.nbest, fixed, args.seed, bar.advance, args.hold
            )
        write(args, (replace(u, hyps=u.hyps[: args.keep]) for u in done))
        return report, weights
    weights = tune_weights(scorer, development, first_pass, args.nbest, fixed, args.seed, args.hold)
    report = RescoringReport(first_pass=first_pass)
    write(args, (reordered(s, weights, report, args.keep) for s in development))
    if args.weights:
        weights.save(args.weights)
    return report, [weights]


def write(args: argparse.Namespace, lists: Iterable[Any]) -> None:
    """One pass over ``lists``, for both outputs; what fails leaves neither."""
    from lowbit.nbest import write_nbest

    if args.out and args.n_best_out:
        # The second writer runs inside the first: each list goes to both before the next one is made.
        lists = tee_to(lists, args.n_best_out)
    path = args.out or args.n_best_out
    write_nbest(path, lists, args.out_format if args.out else None)


def tee_to(lists: Iterable[Any], path: str) -> Iterator[Any]:
    """Pass lists on, each also written to ``path`` as JSON lines, which appears when all are through."""
    from lowbit.nbest_json import dump_list
    from lowbit.streams import text_output

    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(text_output(path))
        for utterance in lists:
            stream.write(dump_list(utterance, path) + "\n")
            yield utterance


def print_result(args: argparse.Namespace, result: dict[str, Any], used: list[dict[str, Any]]) -> None:
    console = (
        cli.console(args) if "-" not in (args.out, args.n_best_out) else cli.console(argparse.Namespace(json=True))
    )
    if "rescored_wer" in result:
        names = ("first_pass", "rescored", "oracle")
        rates = [f"{name.replace('_', ' ')} {result[f'{name}_wer']:.2f}" for name in names]
        console.print("WER %: " + ", ".join(rates))
    for weights in used:
        shown = [f"{n} {weights[n]:.4g}" for n in WEIGHTS if n in WEIGHTS[:2] or weights[n] != DEFAULTS[n]]
        console.print(", ".join(shown) + (" (tuned on this list)" if args.tune else ""))
    share = result["oov"] / max(1, result["words"])
    counts = f"{result['utterances']:,} utterances, {result['hypotheses']:,} hypotheses"
    factor = f", real-time factor {result['real_time_factor']:.2g}" if "real_time_factor" in result else ""
    console.print(f"{counts}, {result['utterances_per_second']:,.0f} utterances/s{factor}")
    console.print(f"{result['oov']:,} of {result['words']:,} words ({share:.2%}) unknown, scored as <unk>")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
