"""`lowbit generate`: continue a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lowbit.tools import cli
from lowbit.tools.engine_options import add_engine_options, add_model, load_engine


def parser() -> argparse.ArgumentParser:
    p = cli.parser("generate", 'lowbit generate model.lowbit --prompt "show me the" --max-new-tokens 20 --seed 1')
    add_model(p)
    p.add_argument("--prompt", default="", metavar="TEXT", help="beginning of a sentence (default: nothing)")
    p.add_argument("--max-new-tokens", type=int, default=30, metavar="N", help="stop after N words (default 30)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the best word each time")
    p.add_argument("--top-k", type=int, metavar="K", help="sample among the K most probable words")
    p.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add_engine_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    lm = load_engine(args)
    n_words, n_oov = len(args.prompt.split()), lm.vocab.encode(args.prompt)[1]
    text = lm.generate(args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.seed)
    cli.console(args).print(text, markup=False, soft_wrap=True)
    if n_oov:
        print(f"lowbit generate: {n_oov} of {n_words} words of the prompt unknown, read as <unk>", file=sys.stderr)
    return {"text": text, "prompt": args.prompt, "n_oov": n_oov, "seed": args.seed, "engine": lm.describe()}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
