"""Word errors and significance as NIST sctk prints them, where it is installed (Debian package sctk)."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.align import align
from lowbit.nbest import read_nbest
from lowbit.significance import mapsswe
from lowbit.wer import score_corpus


def program(name: str) -> str:
    """sclite or sc_stats: on the path, or where Debian puts it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/lib/sctk/bin")
    if not found:
        pytest.skip(f"NIST {name} is not installed (Debian package sctk)")
    return found


def sclite(folder: Path, name: str, refs: list[str], hyps: list[str]) -> tuple[list[int], list[str]]:
    """The Sum row of sclite's raw report, and the alignment of every utterance; leaves NAME.sgml."""
    for file, texts in ((folder / "ref.trn", refs), (folder / f"{name}.trn", hyps)):
        file.write_text("".join(f"{text} (s_{i:05})\n" for i, text in enumerate(texts)))
    arguments = ("-r", "ref.trn", "trn", "-h", f"{name}.trn", "trn", "-i", "rm", "-o", "rsum", "sgml", "-n", name)
    subprocess.run([program("sclite"), *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    total = next(line for line in (folder / f"{name}.raw").read_text().splitlines() if "| Sum" in line)
    sgml = (folder / f"{name}.sgml").read_text()
    paths = re.findall(r'<PATH id="\(s_(\d+)\)"[^>]*>\n(.*?)\n?</PATH>', sgml, re.S)
    edits = {int(i): "".join(re.findall(r"(?:^|:)([CSDI]),", path)) for i, path in paths}
    return [int(n) for n in re.findall(r"\d+", total)], [edits[i] for i in range(len(refs))]


def check_counts(folder: Path, name: str, refs: list[str], hyps: list[str]) -> None:
    total, edits = sclite(folder, name, refs, hyps)
    t = score_corpus(refs, hyps).totals()
    correct = t["ref_words"] - t["substitutions"] - t["deletions"]
    ours = [t["utterances"], t["ref_words"], correct, t["substitutions"], t["deletions"], t["insertions"], t["errors"]]
    assert [*ours, t["wrong_utterances"]] == total
    assert [align(r.split(), h.split()) for r, h in zip(refs, hyps)] == edits


def check_mapsswe(folder: Path, refs: list[str], a: list[str], b: list[str]) -> float:
    """sc_stats prints p with three digits, or "<0.001"."""
    both = (folder / "a.sgml").read_bytes() + (folder / "b.sgml").read_bytes()
    command = [program("sc_stats"), "-p", "-t", "mapsswe", "-u", "-n", "-"]
    report = subprocess.run(command, cwd=folder, input=both, capture_output=True, check=True).stdout.decode()
    printed = re.search(r"\|\s+MP\s.*?(<?\d\.\d{3})", report).group(1)
    p = mapsswe(refs, a, b).p_sctk
    assert printed == ("<0.001" if p < 0.001 else f"{p:.3f}")
    return p


def noisy(rng: random.Random, text: str, rate: float) -> str:
    kinds = ("x", "", "a b", "c")
    return " ".join(rng.choice(kinds) if rng.random() < rate else word for word in text.split())


def test_random_corpora(tmp_path):
    rng = random.Random(0)
    refs = [" ".join(rng.choices("abcdefg", k=rng.randint(1, 25))) for _ in range(400)]
    unrelated = [" ".join(rng.choices("abcdefg", k=rng.randint(1, 25))) for _ in range(400)]
    check_counts(tmp_path, "unrelated", refs, unrelated)
    seen = set()
    for rate in (0.2, 0.22, 0.3):
        a, b = ([noisy(rng, r, x) for r in refs] for x in (0.2, rate))
        check_counts(tmp_path, "a", refs, a)
        check_counts(tmp_path, "b", refs, b)
        seen.add(check_mapsswe(tmp_path, refs, a, b) < 0.001)
    assert seen == {True, False}


@pytest.mark.data
@pytest.mark.parametrize("name", ["atis/test", "swbd/test", "l2/dev"])
def test_real_lists(data_dir, tmp_path, name):
    lists = list(read_nbest(data_dir / f"{name}.jsonl"))
    refs = [u.ref for u in lists]
    best = [u.hyps[0].text for u in lists]
    check_counts(tmp_path, "a", refs, best)
    # The second best in some utterances: a difference that is neither nothing nor overwhelming.
    mixed = [u.hyps[min(1, len(u.hyps) - 1)].text if i % 20 == 0 else t for i, (u, t) in enumerate(zip(lists, best))]
    check_counts(tmp_path, "b", refs, mixed)
    assert 1e-6 < check_mapsswe(tmp_path, refs, best, mixed) < 1
