"""Synthetic N-best lists streamed through the readers, `lowbit wer` and `lowbit rescore`: speed, and peak memory at two
lengths, which shows whether memory depends on the length.

    python bench/nbest_stream.py --json docs/results/nbest-stream.json
    python bench/nbest_stream.py --model model.lowbit --ngram 3gram.arpa
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

READ = "from lowbit.nbest import read_nbest\nprint(sum(len(u.hyps) for u in read_nbest('-')))"
WORDS = [f"{a}{b}" for a in ("ka", "to", "mi", "se", "nu", "ra", "lo") for b in ("ba", "du", "fe", "go", "pi", "x")]


def bodies(hypotheses: int, count: int = 200, length: int = 12, seed: int = 0) -> list[bytes]:
    """``count`` lists without their ids: noisy copies of a random sentence of ``length`` words."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        ref = rng.choices(WORDS, k=length)
        texts = [" ".join(w if rng.random() > 0.1 else rng.choice(WORDS) for w in ref) for _ in range(hypotheses)]
        hyps = [{"text": t, "am": -round(i + rng.random(), 4)} for i, t in enumerate(texts)]
        out.append(json.dumps({"ref": " ".join(ref), "hyps": hyps}).encode()[1:] + b"\n")
    return out


def feed(pipe: IO[bytes], lists: list[bytes], utterances: int) -> None:
    for i in range(utterances):
        pipe.write(b'{"id": "u%d", ' % i + lists[i % len(lists)])
    pipe.close()


def run(command: list[str], lists: list[bytes], utterances: int) -> dict[str, Any]:
    """Feed ``command``; its seconds and its peak resident memory."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    feed(child.stdin, lists, utterances)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{command[:4]} failed")
    seconds = time.perf_counter() - started
    rate, peak = round(utterances / seconds), round(usage.ru_maxrss / 1024, 1)
    return {"utterances": utterances, "seconds": round(seconds, 2), "utterances_per_second": rate, "peak_mib": peak}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--utterances", type=int, nargs="+", default=[10_000, 100_000])
    p.add_argument("--hypotheses", type=int, default=100)
    p.add_argument("--model", help="also rescore with this model")
    p.add_argument("--ngram", help="also rescore with this n-gram (and with both)")
    p.add_argument("--only", choices=("read", "wer", "rescore"), help="one of the parts")
    p.add_argument("--json", metavar="FILE", help="write the result here")
    args = p.parse_args()
    lists = bodies(args.hypotheses)
    python, lowbit = [sys.executable, "-c", READ], [sys.executable, "-m", "lowbit.tools.cli"]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "best.trn")
        parts = {"read": python, "wer": [*lowbit, "wer", "-", "--ref-format", "jsonl"]}
        models = ([args.model] if args.model else []) + (["--ngram", args.ngram] if args.ngram else [])
        if models:
            parts["rescore"] = [*lowbit, "rescore", *models, "--nbest", "-", "--out", out, "--lm-weight", "0.5"]
        chosen = {name: command for name, command in parts.items() if args.only in (None, name)}
        result = {name: [run(command, lists, n) for n in args.utterances] for name, command in chosen.items()}
    names = {kind: path and Path(path).name for kind, path in (("model", args.model), ("ngram", args.ngram))}
    record = {"hypotheses": args.hypotheses, **names, "parts": result}
    text = json.dumps(record, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
