"""Perplexity of packed models with activations rounded to int8 against exact fp32 activations.

python bench/engine_exact.py runs/ptb/admm.lowbit --text ../shared/data/ptb/ptb.test.txt --json FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lowbit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="packed models that were trained on such text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    lines = args.text.read_text(encoding="utf-8").split("\n")
    report = {}
    for path in args.models:
        ppl = {compute: lowbit.load(path, compute=compute).perplexity(lines) for compute in ("exact", "int8")}
        report[path.name] = ppl | {"percent": 100 * (ppl["int8"] / ppl["exact"] - 1)}
        print(f"{path.name}: exact {ppl['exact']:.3f}, int8 {ppl['int8']:.3f} ({report[path.name]['percent']:+.3f} %)")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
