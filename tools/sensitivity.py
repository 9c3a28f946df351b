"""Measure how much each matrix suffers at each precision: fp.safetensors -> sens.json (DESIGN section 7)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lowbit.errors import LowbitError, check_seed
from lowbit.files import write_json
from lowbit.tools import cli
from lowbit.tools.search.choices import CHOICES, matrix_parameters, parse_choices
from lowbit.tools.search.estimators import (
    METRICS,
    Curvature,
    Kl,
    StoppingRule,
    Text,
    measured_increase,
    spearman,
)
from lowbit.tools.search.filesize import FileSize
from lowbit.tools.search.rounds import collect, finish, standard_error
from lowbit.tools.search.sensitivities import SENSITIVITY_VERSION
from lowbit.tools.search.start import load_full_precision
from lowbit.tools.training.parallel import Parallel
from lowbit.tools.training.start import Corpora, prepare_run

_TOKENS = {"hessian": 2048, "fisher": 2048, "kl": 512}  # a sample reads


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "sensitivity",
        "lowbit sensitivity fp.safetensors --data data/ptb --metric hessian --out sens.json\n"
        "torchrun --nproc-per-node 2 tools/sensitivity.py fp.safetensors --data data/ptb --metric kl --out sens.json",
        "hessian  half the mean curvature of the loss times the squared rounding error (Hutchinson's estimate)\n"
        "fisher   the same with the Fisher information of the model's own predictions, which is never negative\n"
        "kl       KL divergence of the predictions, with the other matrices untouched and at 2 bits, averaged\n\n"
        "Samples until every matrix's standard error is below --standard-error of its value, or allocations at\n"
        "--ratio have settled, or --samples MOST. An interrupted run goes on when the same command is given again.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a full-precision checkpoint of `lowbit train`")
    p.add_argument("--data", required=True, metavar="DIR", help="the text that the checkpoint was trained on")
    p.add_argument("--metric", required=True, choices=METRICS)
    p.add_argument("--out", required=True, metavar="FILE", help="sensitivities to write (JSON)")
    p.add_argument("--choices", default=",".join(CHOICES), metavar="LIST", help="precisions (default: %(default)s)")
    p.add_argument("--samples", type=int, nargs=2, default=(16, 500), metavar=("LEAST", "MOST"),
                   help="probes, or batches for kl (default: 16 500)")  # fmt: skip
    p.add_argument("--tokens", type=int, metavar="N", help="tokens a sample reads (default: 2048, or 512 for kl)")
    p.add_argument("--standard-error", type=float, default=0.05, metavar="S", help="default: %(default)s")
    p.add_argument("--agreement", type=float, default=0.95, metavar="A",
                   help="share of choices that bootstrap allocations must share (default: %(default)s)")  # fmt: skip
    p.add_argument("--ratio", type=float, default=16.0, help="compression of those allocations (default: %(default)s)")
    p.add_argument("--check", metavar="CHOICE", choices=list(CHOICES),
                   help="also measure the loss with each matrix rounded to this, and the rank correlation")  # fmt: skip
    p.add_argument("--check-tokens", type=int, default=131_072, metavar="N", help="of that (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="order of the text, and probes (default: %(default)s)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--restart", action="store_true", help="start anew, dropping an interrupted run's samples")
    return p


def check_arguments(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    least, most = args.samples
    if not 2 <= least <= most:
        raise LowbitError(f"--samples {least} {most}: needs 2 <= LEAST <= MOST")
    for name in ("tokens", "check_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise LowbitError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("standard_error", "agreement"):
        if not 0 < getattr(args, name) <= 1:
            raise LowbitError(f"--{name.replace('_', '-')} must lie in (0, 1], not {getattr(args, name)}")


def body(args: argparse.Namespace) -> dict[str, Any]:
    args.stage, args.precision = "sensitivity", "fp32"
    check_arguments(args)
    choices = parse_choices(args.choices)
    checkpoint, config = load_full_precision(args.checkpoint)
    corpora = Corpora.read(args.data, config, checkpoint.vocab)
    device, _, parallel = prepare_run(args, args.seed)
    model = checkpoint.build_model().to(device)
    weights = matrix_parameters(model, checkpoint.config)
    text = Text(corpora.train, args.tokens or _TOKENS[args.metric], args.seed)
    size = FileSize.of(checkpoint)
    started = time.monotonic()
    if args.metric == "kl":
        estimator: Curvature | Kl = Kl(model, weights, choices, text)
    else:
        estimator = Curvature(model, weights, choices, text, args.seed, args.metric)
    rule = StoppingRule(estimator, size, args.ratio, choices, args.samples[0], args.standard_error, args.agreement)
    identity = {name: getattr(args, name) for name in ("metric", "tokens", "samples", "ratio", "seed")}
    identity |= {"choices": choices, "text": corpora.digest, "weights": checkpoint.info | {"sum": _checksum(weights)},
                 "rule": [args.standard_error, args.agreement]}  # fmt: skip
    samples, reason = collect(
        estimator.sample, rule, args.samples[1], args.out, identity, parallel, restart=args.restart,
        round_size=2 if args.metric == "kl" else 8, label=args.metric,
    )  # fmt: skip
    matrices = describe(estimator, samples, list(weights), choices)
    if args.metric == "hessian":
        replace_negative(args, estimator, rule, samples, matrices, identity, parallel, choices)
    result = {
        "version": SENSITIVITY_VERSION, "metric": args.metric, "checkpoint": str(args.checkpoint), "choices": choices,
        "samples": len(samples), "tokens_per_sample": args.tokens or _TOKENS[args.metric], "stopped_by": reason,
        "largest_relative_error": float(rule.relative_error(samples).max()), "agreement": rule.agreeing(samples),
        "agreement_ratio": args.ratio, "seed": args.seed, "matrices": matrices, "file": size.to_dict(),
    }  # fmt: skip
    if args.check:
        result["check"] = check(args, model, weights, text, matrices)
    result["seconds"] = round(time.monotonic() - started, 1)
    if parallel.is_main:
        write_json(args.out, cli.finite(result))
        show(args, result)
    finish(args.out, identity, parallel)
    parallel.close()
    return result


def _checksum(weights: Mapping[str, torch.Tensor]) -> list[float]:
    """Enough of the weights to tell two checkpoints of the same training configuration apart."""
    return [float(w.detach().double().sum()) for w in weights.values()]


def describe(
    estimator: Curvature | Kl, samples: np.ndarray, names: Sequence[str], choices: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Per matrix: squared rounding errors, costs with their standard errors, and the trace behind them."""
    mean, each = samples.mean(axis=0), np.stack([estimator.costs(s) for s in samples])
    costs, errors = estimator.costs(mean), standard_error(each)
    rows = {}
    for i, name in enumerate(names):
        rows[name] = {
            "squared_error": dict(zip(choices, estimator.squared_errors[i].tolist())),
            "omega": dict(zip(choices, costs[i].tolist())),
            "omega_standard_error": dict(zip(choices, errors[i].tolist())),
        }
        if isinstance(estimator, Curvature):
            trace_error = float(standard_error(samples[:, i]))
            rows[name] |= {"trace": float(mean[i]), "trace_standard_error": trace_error, "estimator": estimator.metric}
    return rows


def replace_negative(
    args: argparse.Namespace, estimator: Curvature, rule: StoppingRule, samples: np.ndarray,
    matrices: dict[str, dict[str, Any]], identity: dict[str, Any], parallel: Parallel, choices: Sequence[str],
) -> None:  # fmt: skip
    """Where the Hessian's trace came out negative, the Fisher's stands in its place; said aloud."""
    names = list(matrices)
    negative = [i for i, name in enumerate(names) if matrices[name]["trace"] <= 0]
    if not negative:
        return
    if parallel.is_main:
        listed = ", ".join(names[i] for i in negative)
        print(f"sensitivity: the Hessian's trace is not positive, so the Fisher's is used: {listed}", file=sys.stderr)
    other = estimator.with_metric("fisher")

    def enough(fisher: np.ndarray) -> str | None:
        small = rule.relative_error(fisher)[negative].max() < args.standard_error
        return "standard error" if len(fisher) >= args.samples[0] and small else None

    out, identity = f"{args.out}.fisher", identity | {"metric": "fisher"}
    fisher, _ = collect(
        other.sample, enough, args.samples[1], out, identity, parallel, restart=args.restart, label="fisher"
    )
    rows = describe(other, fisher, names, choices)
    for i in negative:
        trace = {"hessian_trace": matrices[names[i]]["trace"]}
        matrices[names[i]] = rows[names[i]] | trace
    finish(out, identity, parallel)


def check(
    args: argparse.Namespace, model: torch.nn.Module, weights: Mapping[str, torch.nn.Parameter], text: Text,
    matrices: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Predicted costs against the measured increase of the loss, one matrix at a time, and against its even part."""
    tokens = text[0].tokens.numel()
    batches = max(2, -(-args.check_tokens // tokens))
    measured = measured_increase(model, weights, args.check, text, batches)
    predicted = [matrices[m]["omega"][args.check] for m in weights]
    out = {"choice": args.check, "tokens": batches * tokens, "measured": measured}
    for name, part in (("spearman", "nll"), ("spearman_even", "even")):
        out[name] = spearman(predicted, [measured[m][part] for m in weights])
    return out


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{args.out}: cost of rounding, nats a token ({result['metric']})", title_justify="left")
    for heading in ("matrix", *result["choices"], "± at the first"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    first = result["choices"][0]
    for name, row in result["matrices"].items():
        note = " (Fisher)" if "hessian_trace" in row else ""
        cells = [f"{row['omega'][c]:.2e}" for c in result["choices"]]
        table.add_row(name + note, *cells, f"{row['omega_standard_error'][first]:.1e}")
    console = cli.console(args)
    console.print(table)
    console.print(
        f"{result['samples']} samples of {result['tokens_per_sample']} tokens, stopped by {result['stopped_by']};"
        f" largest relative error {result['largest_relative_error']:.1%},"
        f" allocations at {result['agreement_ratio']:g}x agree to {result['agreement']:.1%}"
    )
    if "check" in result:
        c = result["check"]
        console.print(
            f"Spearman's rho with the measured increase at {c['choice']}: {c['spearman']:.3f};"
            f" with its even part {c['spearman_even']:.3f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
