"""Do NIST sclite and sc_stats print the counts and the probabilities of `lowbit wer`? On real lists, every system.

    python bench/sctk.py --data DATA --runs runs --json docs/results/sctk.json

DATA/{atis,swbd,l2} hold the lists; RUNS/asr-CORPUS/*.test.jsonl, where there are such, what `lowbit reproduce-asr` made
of them. Needs sctk (Debian package sctk). Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LISTS = {"atis": "test", "swbd": "test", "l2": "dev"}
COUNTS = ("utterances", "words", "correct", "substitutions", "deletions", "insertions", "errors", "wrong_utterances")
FIRST, TWENTIETH = "first", "second best in every 20th"


def program(name: str) -> str | None:
    """sclite or sc_stats: on the path, or where Debian puts it."""
    return shutil.which(name) or shutil.which(name, path="/usr/lib/sctk/bin")


def sclite(folder: Path, name: str, refs: Sequence[str], hyps: Sequence[str]) -> tuple[list[int], list[str]]:
    """The Sum row of sclite's raw report (``COUNTS``), and the alignment of every utterance; leaves NAME.sgml."""
    for file, texts in ((folder / "ref.trn", refs), (folder / f"{name}.trn", hyps)):
        file.write_text("".join(f"{text} (s_{i:05})\n" for i, text in enumerate(texts)))
    arguments = ("-r", "ref.trn", "trn", "-h", f"{name}.trn", "trn", "-i", "rm", "-o", "rsum", "sgml", "-n", name)
    subprocess.run([program("sclite"), *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    total = next(line for line in (folder / f"{name}.raw").read_text().splitlines() if "| Sum" in line)
    sgml = (folder / f"{name}.sgml").read_text()
    paths = re.findall(r'<PATH id="\(s_(\d+)\)"[^>]*>\n(.*?)\n?</PATH>', sgml, re.S)
    edits = {int(i): "".join(re.findall(r"(?:^|:)([CSDI]),", path)) for i, path in paths}
    return [int(n) for n in re.findall(r"\d+", total)], [edits[i] for i in range(len(refs))]


def sc_stats(folder: Path, a: str, b: str) -> str:
    """The probability of MAPSSWE as sc_stats prints it, three digits or "<0.001"; of what :func:`sclite` left."""
    both = b"".join((folder / f"{name}.sgml").read_bytes() for name in (a, b))
    command = [program("sc_stats"), "-p", "-t", "mapsswe", "-u", "-n", "-"]
    report = subprocess.run(command, cwd=folder, input=both, capture_output=True, check=True).stdout.decode()
    return re.search(r"\|\s+MP\s.*?(<?\d\.\d{3})", report).group(1)


def counts(refs: Sequence[str], hyps: Sequence[str]) -> list[int]:
    """``COUNTS`` by lowbit."""
    from lowbit.wer import score_corpus

    t = score_corpus(refs, hyps).totals()
    correct = t["ref_words"] - t["substitutions"] - t["deletions"]
    edits = [t[name] for name in ("substitutions", "deletions", "insertions", "errors", "wrong_utterances")]
    return [t["utterances"], t["ref_words"], correct, *edits]


def printed(p: float) -> str:
    """A probability in the way of sc_stats."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def systems(lists: Sequence[Any], run: Path) -> dict[str, list[str]]:
    """Hypotheses of the first pass, of a variation of it that is a little worse, and of every rescored list."""
    from lowbit.nbest import read_nbest

    best = [u.hyps[0].text for u in lists]
    second = [u.hyps[min(1, len(u.hyps) - 1)].text for u in lists]
    found = {FIRST: best, TWENTIETH: [s if i % 20 == 0 else b for i, (b, s) in enumerate(zip(best, second))]}
    for path in sorted(run.glob("*.test.jsonl")):
        found[path.name.removesuffix(".test.jsonl")] = [u.hyps[0].text for u in read_nbest(path)]
    return found


def compare(lists: Sequence[Any], run: Path) -> dict[str, Any]:
    """Counts of every system, and probabilities of the pairs that the documentation reports, by both."""
    from lowbit.align import align
    from lowbit.significance import mapsswe
    from lowbit.tools.asr_experiment import COMPARISONS

    refs, texts = [u.ref for u in lists], systems(lists, run)
    result: dict[str, Any] = {"systems": {}, "pairs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, (system, hyps) in enumerate(texts.items()):
            theirs, edits = sclite(folder, str(i), refs, hyps)
            same = [align(r.split(), h.split()) for r, h in zip(refs, hyps)] == edits
            ours = counts(refs, hyps)
            result["systems"][system] = {
                "counts": dict(zip(COUNTS, ours)), "sclite": dict(zip(COUNTS, theirs)),
                "equal": ours == theirs and same,
            }  # fmt: skip
        number = {system: str(i) for i, system in enumerate(texts)}
        for a, b in [(FIRST, TWENTIETH), *(pair for pair in COMPARISONS if set(pair) <= set(texts))]:
            theirs, test = sc_stats(folder, number[a], number[b]), mapsswe(refs, texts[a], texts[b])
            result["pairs"].append({
                "a": a, "b": b, "sc_stats": theirs, "p_sctk": printed(test.p_sctk), "p": test.p,
                "segments": test.segments, "equal": theirs == printed(test.p_sctk),
            })  # fmt: skip
    return result


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--runs", default="runs", metavar="DIR")
    p.add_argument("--corpus", nargs="+", choices=LISTS, default=list(LISTS))
    p.add_argument("--json", metavar="FILE", help="write the result here")
    args = p.parse_args()
    from lowbit.nbest import read_nbest

    if not (program("sclite") and program("sc_stats")):
        sys.exit("sclite and sc_stats are not installed (Debian package sctk)")
    result = {}
    for corpus in args.corpus:
        lists = list(read_nbest(Path(args.data) / corpus / f"{LISTS[corpus]}.jsonl"))
        result[corpus] = found = compare(lists, Path(args.runs) / f"asr-{corpus}")
        for name, system in found["systems"].items():
            print(f"{corpus}: {name}: {system['counts']}: {'equal' if system['equal'] else system['sclite']}")
        for pair in found["pairs"]:
            shown = f"p {pair['p']:.4f}, {pair['p_sctk']}, by sc_stats {pair['sc_stats']}"
            print(f"{corpus}: {pair['a']} against {pair['b']}: {shown}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    equal = [r["equal"] for found in result.values() for r in (*found["systems"].values(), *found["pairs"])]
    print(f"{sum(equal)} of {len(equal)} comparisons equal")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
