"""`lowbit evaluate`: the perplexity of a checkpoint or a packed model on a text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.tools import cli
from lowbit.tools.engine_options import add_engine_options, add_model, load_engine


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "evaluate",
        "lowbit evaluate model.lowbit --text ptb.test.txt --mode stream --stride 64",
        "stream joins all lines by </s> and reads them with a sliding context; sentence reads each line by itself.\n"
        "Words outside the vocabulary are scored as <unk> and counted.",
    )
    add_model(p)
    p.add_argument("--text", required=True, metavar="FILE", help="text, one sentence a line")
    p.add_argument("--mode", choices=("stream", "sentence"), default="stream")
    p.add_argument("--stride", type=int, metavar="N", help="tokens that the context slides by (default: half of it)")
    p.add_argument("--token-nll", metavar="FILE.npy", help="also write the NLL of every token (fp32, in nats)")
    add_engine_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.errors import LowbitError
    from lowbit.files import atomic_path, check_writable, read_lines

    if args.token_nll:
        check_writable(args.token_nll)
    lines = [line for line in read_lines(args.text) if line.strip()]
    if not lines:
        raise LowbitError(f"{args.text}: the file holds no text")
    lm = load_engine(args)
    start = time.perf_counter()
    # Words and an end of sentence a line: what the engine will count.
    total = sum(len(line.split()) + 1 for line in lines)
    with cli.Progress("evaluate", total, "token") as bar:
        result = lm.evaluate(lines, args.mode, args.stride, bar.advance)
    seconds = time.perf_counter() - start
    if args.token_nll:
        with atomic_path(args.token_nll) as temporary, open(temporary, "wb") as stream:
            np.save(stream, result.token_nll)
    console = cli.console(args)
    console.print(f"perplexity {result.ppl:.3f}  ({args.mode}, stride {result.stride}, context {result.max_len})")
    share = result.n_oov / (result.n_tokens - result.n_lines)
    console.print(f"{result.n_tokens:,} tokens in {result.n_lines:,} lines")
    console.print(f"{result.n_oov:,} words ({share:.2%}) unknown, scored as <unk>")
    console.print(f"{result.n_tokens / seconds:,.0f} tokens/s")
    measured = {"text": args.text, "seconds": seconds, "tokens_per_second": result.n_tokens / seconds}
    return result.to_dict() | measured | {"engine": lm.describe()}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
