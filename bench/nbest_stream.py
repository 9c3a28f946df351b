"""Synthetic N-best lists streamed through the readers, `lowbit wer` and `lowbit rescore`: peak memory at several
lengths, which shows whether it depends on the length, and speed.

    python bench/nbest_stream.py --ngram 3gram.arpa --json docs/results/nbest-stream.json

Lists are made on the fly and piped to the program's standard input. Without --model a tiny packed model of random
weights rescores: its own size is constant, and what is looked for is what grows.
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
PARTS = ["read", "wer", "rescore-lm", "rescore-ngram"]
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


def write_tiny_model(path: Path) -> None:
    """One layer; knows every word of the lists."""
    sys.path.insert(0, str(Path(__file__).parent))
    from engine_model import write_random_model

    from lowbit.config import ModelConfig
    from lowbit.vocab import Vocab

    vocab = Vocab(["</s>", "<unk>", *WORDS])
    config = ModelConfig(vocab_size=len(vocab.tokens), d_model=64, n_layers=1, n_heads=1, d_ffn=64, max_len=32)
    write_random_model(path, vocab, config)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--utterances", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    p.add_argument("--hypotheses", type=int, default=100)
    p.add_argument("--model", help="of the part rescore-lm (default: a tiny one)")
    p.add_argument("--ngram", help="of the part rescore-ngram, which is left out without one")
    p.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the parts")
    p.add_argument("--json", metavar="FILE", help="write the result here; other parts that stand there stay")
    args = p.parse_args()
    lists = bodies(args.hypotheses)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "tiny.lowbit")
        if "rescore-lm" in args.only and not args.model:
            write_tiny_model(Path(model))
        chosen = {name: command for name, command in commands(args.ngram, model, folder).items() if name in args.only}
        result = {name: [run(command, lists, n) for n in args.utterances] for name, command in chosen.items()}
    parts = {f"{name}, {args.hypotheses} hypotheses": runs for name, runs in result.items()}
    text = json.dumps(merged(args.json, parts), indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)


def commands(ngram: str | None, model: str, folder: str) -> dict[str, list[str]]:
    """What is fed, by part."""
    lowbit = [sys.executable, "-m", "lowbit.tools.cli"]
    rescore = [*lowbit, "rescore", "--nbest", "-", "--out", str(Path(folder) / "best.trn"), "--lm-weight", "0.5"]
    parts = {
        "read": [sys.executable, "-c", READ],
        "wer": [*lowbit, "wer", "-", "--ref-format", "jsonl"],
        "rescore-lm": [*rescore, model],
    }
    return parts | ({"rescore-ngram": [*rescore, "--ngram", ngram]} if ngram else {})


def merged(path: str | None, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts, beside those that an earlier run left in ``path``."""
    before = json.loads(Path(path).read_text())["parts"] if path and Path(path).exists() else {}
    return {"parts": before | parts}


if __name__ == "__main__":
    main()
