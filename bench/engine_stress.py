"""Eight threads that score and decode at once, then a million advances: the same results as alone, and no growth.

    python bench/engine_stress.py [--seconds 60] [--advances 1000000] [--json FILE]

The model is small (2 layers of 64), so that calls are short and threads meet often.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engine_model
import numpy as np

import lowbit
from lowbit.vocab import Vocab

WORDS = [f"w{i}" for i in range(998)]


def resident_mib() -> float:
    """Memory of this process now (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * 4096 / 2**20


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--advances", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    config = replace(engine_model.CONFIG, vocab_size=1000, d_model=64, n_layers=2, n_heads=4, d_ffn=256)
    engine_model.write_random_model(args.work / "stress.lowbit", Vocab(["</s>", "<unk>", *WORDS]), config)
    lm = lowbit.load(args.work / "stress.lowbit", threads=2)
    report = {"threads": threads(lm, args.seconds), "advances": advances(lm, args.advances)}
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["threads"]["wrong"]:
        sys.exit("results of threads differ")


def threads(lm: lowbit.LanguageModel, seconds: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    lists = [[" ".join(rng.choice(WORDS[:40], rng.integers(1, 20))) for _ in range(9)] for _ in range(64)]
    expected = [lm.score_nbest([hyps])[0].logprobs for hyps in lists]
    walks = [walk(lm, i) for i in range(8)]
    calls, wrong = [0] * 8, [0] * 8
    start = time.monotonic()

    def work(i: int) -> None:
        own = np.random.default_rng(i)
        while time.monotonic() - start < seconds:
            at = int(own.integers(len(lists) - 8))
            several = lm.score_nbest(lists[at : at + 8])
            same = all(np.array_equal(s.logprobs, e) for s, e in zip(several, expected[at : at + 8]))
            wrong[i] += not (same and walk(lm, i) == walks[i])
            calls[i] += 2
            if not early and time.monotonic() - start > seconds / 3:
                early.append(resident_mib())

    early: list[float] = []  # memory after a third of the time, when every thread has its workspace
    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    return {
        "seconds": seconds,
        "calls": sum(calls),
        "wrong": sum(wrong),
        "grown_mib": resident_mib() - early[0],
    }


def walk(lm: lowbit.LanguageModel, seed: int) -> list[float]:
    """Log-probabilities along a random text."""
    rng, state, found = np.random.default_rng(seed), lm.begin(), []
    for word in rng.choice(WORDS, 12):
        logprob, state = lm.advance(state, str(word))
        found.append(logprob)
    return found


def advances(lm: lowbit.LanguageModel, count: int) -> dict[str, float]:
    """A beam of 8 states, each step from a random one; the text is endless, so contexts slide."""
    rng = np.random.default_rng(1)
    beam, size = [lm.begin()] * 8, {}
    picks, words = rng.integers(0, 8, (2, count)), rng.integers(0, len(WORDS), count)
    start = time.perf_counter()
    for i in range(count):
        _, beam[picks[1, i]] = lm.advance(beam[picks[0, i]], WORDS[words[i]])
        if i in (count // 10, count - 1):
            size[i] = resident_mib(), lm.backend.cache_bytes / 2**20
    seconds, ((early, early_cache), (late, cache)) = time.perf_counter() - start, size.values()
    # The cache holds the most tokens that were ever alive at a time; a later maximum makes it grow.
    return {"count": count, "us_each": seconds / count * 1e6, "grown_mib": late - early,
            "cache_mib": cache, "cache_grown_mib": cache - early_cache}  # fmt: skip


if __name__ == "__main__":
    main()
