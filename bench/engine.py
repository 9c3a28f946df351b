"""The engine against PyTorch and ONNX Runtime on N-best lists, a text and single tokens; a table and a JSON.

Everyone takes turns in one process (the best of some rounds counts), so that the ratios hold on a busy machine too. The
models have random weights: speed only. The size is 6 layers of 512/2048, 8 heads, 10,000 words, 2 bits on average.

    python bench/engine.py --data ../shared/data --out docs/results/engine.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from engine_model import BITS, CONFIG, words_of, write_random_model
from engine_rivals import OnnxRival, TorchRival, padded

import lowbit
from lowbit.forest import chains, tries, windows

ROUNDS = 5
REST = 0.1  # seconds before a turn: threads of the one before (ONNX Runtime's) spin for a while
# What each round scores: so much that it takes about a second. The rivals take an even sample of the same lists.
LISTS, RIVAL_LISTS, TOKENS, RIVAL_TOKENS, DECODED = 800, 30, 16_384, 2_048, 64
SEQUENCES = 20  # that the engine decodes while a rival decodes one


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with l2/dev.jsonl, atis/test.jsonl, ptb/ptb.test.txt"
    )
    parser.add_argument("--out", type=Path, help="JSON with all figures; a table beside it (.md)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="where models are kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", help="comma-separated contenders, of " + ", ".join(CONTENDERS))
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    files = {
        "l2": args.data / "l2/dev.jsonl",
        "atis": args.data / "atis/test.jsonl",
        "ptb": args.data / "ptb/ptb.test.txt",
    }
    path = args.work / "random-2bit.lowbit"
    if not path.exists():
        write_random_model(path, words_of(list(files.values())))
    names = args.only.split(",") if args.only else list(CONTENDERS)
    lm = lowbit.load(path, threads=args.threads)
    tasks = load_tasks(files, lm)
    jobs = {name: make_jobs(name, tasks, lm, args) for name in names}
    best: dict[str, dict[str, float]] = {name: {} for name in names}
    for _ in range(args.rounds):
        for name in names:
            for task, (amount, job) in jobs[name].items():
                time.sleep(REST)
                start = time.perf_counter()
                job()
                rate = amount / (time.perf_counter() - start)
                best[name][task] = max(best[name].get(task, 0.0), rate)
    report = {"rates": best, "profile": profile(lm, tasks), "trie": trie_ratio(lm, tasks["l2"])}
    report |= {"memory_mib": memory(path), "packed_bytes": path.stat().st_size, "model": CONFIG.to_dict(), "bits": BITS}
    report |= {
        "engine": lm.describe() | {"path": path.name},
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
    }
    table = render(report)
    print(table)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table, encoding="utf-8")


def load_tasks(files: dict[str, Path], lm: lowbit.LanguageModel) -> dict[str, list]:
    """Lists of texts of "l2" and "atis"; token ids of "ptb"."""
    tasks: dict[str, list] = {}
    for name in ("l2", "atis"):
        with open(files[name], encoding="utf-8") as stream:
            tasks[name] = [[h["text"] for h in json.loads(line)["hyps"]] for line in stream][:LISTS]
    text = files["ptb"].read_text(encoding="utf-8").split("\n")
    tasks["ptb"] = [0, *(i for line in text if line.strip() for i in (*lm.vocab.encode(line)[0], 0))][: TOKENS + 1]
    return tasks


Job = tuple[int, Callable[[], object]]


def make_jobs(name: str, tasks: dict[str, list], lm: lowbit.LanguageModel, args: argparse.Namespace) -> dict[str, Job]:
    """What one contender runs: task -> (utterances or tokens, function); each has run once to warm up."""
    jobs: dict[str, Job] = {}
    if name == "lowbit":
        for task in ("l2", "atis"):
            jobs[task] = len(tasks[task]), lambda lists=tasks[task]: lm.score_nbest(lists)
        jobs["ptb"] = TOKENS, lambda: lm._chain_log_probs([tasks["ptb"]], CONFIG.max_len)
        jobs["decode"] = SEQUENCES * DECODED, lambda: [decode(lm, DECODED) for _ in range(SEQUENCES)]
        for _, job in jobs.values():
            job()
        return jobs
    rival = CONTENDERS[name](name, args)
    for task in ("l2", "atis"):
        lists = tasks[task][:: len(tasks[task]) // RIVAL_LISTS][:RIVAL_LISTS]
        batches = [padded([lm.vocab.encode(h)[0] for h in hyps]) for hyps in lists]
        jobs[task] = len(lists), lambda batches=batches: [rival.score(b) for b in batches]
    rows = torch.tensor(tasks["ptb"][:RIVAL_TOKENS]).view(-1, CONFIG.max_len)
    rows = torch.cat([rows, torch.tensor(tasks["ptb"][CONFIG.max_len :: CONFIG.max_len][: len(rows)])[:, None]], 1)
    parts = rows.split(best_batch(rival, rows))
    jobs["ptb"] = RIVAL_TOKENS, lambda: [rival.score(p) for p in parts]
    if isinstance(rival, TorchRival):
        jobs["decode"] = DECODED, lambda: rival.decode(DECODED)
        rival.decode(4)
    for batch in batches[:3]:
        rival.score(batch)
    return jobs


def best_batch(rival, rows: torch.Tensor) -> int:
    """Windows a batch with which this contender is fastest."""
    times = {}
    for size in (1, 4, 8):
        for _ in range(2):
            start = time.perf_counter()
            rival.score(rows[:size])
            times[size] = (time.perf_counter() - start) / size
    return min(times, key=times.get)


def decode(lm: lowbit.LanguageModel, tokens: int) -> None:
    state = lm.begin()
    for _ in range(tokens):
        _, state = lm.advance(state, "the")


def profile(lm: lowbit.LanguageModel, tasks: dict[str, list]) -> dict[str, dict[str, float]]:
    """Microseconds a node of every phase when scoring, on one thread."""
    ids = [[lm.vocab.encode(h)[0] for h in hyps] for hyps in tasks["l2"][:200]]
    queries = {
        "l2": tries(ids, CONFIG.max_len, 64)[0],
        "ptb": chains(windows(tasks["ptb"][:4097], CONFIG.max_len, 128)),
    }
    found = {}
    for name, query in queries.items():
        seconds = min((lm.backend.profile(query) for _ in range(ROUNDS)), key=lambda s: sum(s.values()))
        found[name] = {phase: 1e6 * s / len(query.forest) for phase, s in seconds.items()}
    return found


def trie_ratio(lm: lowbit.LanguageModel, lists: list[list[str]]) -> dict[str, float]:
    """Scoring the distinct hypotheses one by one against as tries: in tokens, and in time in the engine."""
    ids = [[lm.vocab.encode(h)[0] for h in dict.fromkeys(hyps)] for hyps in lists[:200]]
    trie = tries(ids, CONFIG.max_len, 64)[0]
    alone = chains([w for hyps in ids for h in hyps for w in windows([0, *h, 0], CONFIG.max_len, 64)])
    times = {}
    for _ in range(ROUNDS):
        for name, query in (("trie", trie), ("alone", alone)):
            start = time.perf_counter()
            lm.backend.log_probs(query)
            times[name] = min(times.get(name, 1e9), time.perf_counter() - start)
    return {"tokens": len(alone.forest) / len(trie.forest), "time": times["alone"] / times["trie"]}


def memory(path: Path) -> dict[str, float]:
    """Peak memory in MiB of a fresh process that imports torch, and of one that loads the model and scores."""
    # Not ru_maxrss, which a child inherits from its parent.
    peak = "print(next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    score = f"import lowbit; lm = lowbit.load({str(path)!r}); lm.score_nbest([['the cat sat', 'the cat']] * 64); "
    run = {"torch": "import torch; " + peak, "loaded": "import torch; " + score + peak}
    return {
        name: float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for name, code in run.items()
    }


def render(report: dict) -> str:
    """The figures as a Markdown table, with the ratios to fp32 PyTorch."""
    rates = report["rates"]
    lines = [
        "| | L2 20-best, lists/s | ATIS 5-best, lists/s | PTB, tokens/s | one token, µs |",
        "|---|---|---|---|---|",
    ]
    for name, found in rates.items():
        cells = []
        for task in ("l2", "atis", "ptb", "decode"):
            if task not in found:
                cells.append("")
                continue
            shown = f"{1e6 / found[task]:.0f}" if task == "decode" else f"{found[task]:.0f}"
            base = rates.get("torch fp32", {}).get(task)
            cells.append(shown + (f" ({found[task] / base:.1f}x)" if base else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    trie, memory_mib = report["trie"], report["memory_mib"]
    lines += [
        "",
        f"Tries against single hypotheses: {trie['tokens']:.2f} times fewer tokens, {trie['time']:.2f} times faster.",
    ]
    for name, phases in report["profile"].items():
        total = sum(phases.values())
        shown = ", ".join(f"{phase} {us:.1f} ({us / total:.0%})" for phase, us in phases.items())
        lines.append(f"Microseconds a node of {name}, one thread: {shown}.")
    more = memory_mib["loaded"] - memory_mib["torch"]
    lines.append(
        f"Peak memory over a bare torch import: {more:.0f} MiB; the file has {report['packed_bytes'] / 2**20:.1f} MiB."
    )
    return "\n".join(lines) + "\n"


CONTENDERS: dict[str, Callable] = {
    "lowbit": lambda name, args: None,
    "torch fp32": lambda name, args: TorchRival(name),
    "torch bf16": lambda name, args: TorchRival(name),
    "torch int8": lambda name, args: TorchRival(name),
    "onnx fp32": lambda name, args: OnnxRival(name, args.work, args.threads),
    "onnx int8": lambda name, args: OnnxRival(name, args.work, args.threads),
}


if __name__ == "__main__":
    main()
