"""Word errors and significance as NIST sctk prints them: live where it is installed (Debian package sctk), or recorded.

bench/sctk.py does the same for every system of docs/RESULTS.md.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from lowbit.align import align
from lowbit.nbest import read_nbest
from lowbit.significance import mapsswe

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "sctk.py"
spec = importlib.util.spec_from_file_location("sctk", SCRIPT)
sctk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sctk)


@pytest.fixture
def installed() -> None:
    if not (sctk.program("sclite") and sctk.program("sc_stats")):
        pytest.skip("NIST sclite and sc_stats are not installed (Debian package sctk)")


def check_counts(folder: Path, name: str, refs: list[str], hyps: list[str]) -> None:
    total, edits = sctk.sclite(folder, name, refs, hyps)
    assert sctk.counts(refs, hyps) == total
    assert [align(r.split(), h.split()) for r, h in zip(refs, hyps)] == edits


def check_mapsswe(folder: Path, refs: list[str], a: list[str], b: list[str]) -> str:
    p = sctk.printed(mapsswe(refs, a, b).p_sctk)
    assert sctk.sc_stats(folder, "a", "b") == p
    return p


def noisy(rng: random.Random, text: str, rate: float) -> str:
    kinds = ("x", "", "a b", "c")
    return " ".join(rng.choice(kinds) if rng.random() < rate else word for word in text.split())


def corpus(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices("abcdefg", k=rng.randint(1, 25))) for _ in range(400)]


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str], list[tuple[list[str], list[str]]]]:
    """References, texts that have nothing to do with them, and pairs of noisy copies."""
    rng = random.Random(0)
    refs, unrelated = corpus(rng), corpus(rng)
    return refs, unrelated, [([noisy(rng, r, 0.2) for r in refs], [noisy(rng, r, x) for r in refs]) for x in RATES]


RATES = (0.2, 0.21, 0.3)
# Of sclite and sc_stats 2.4.10: the Sum row of the unrelated texts, then of both copies with their probability.
RECORDED_UNRELATED = (400, 5451, 1974, 1330, 2147, 1857, 5334, 400)
RECORDED = (
    ((400, 5451, 4496, 695, 260, 274, 1229, 337), (400, 5451, 4476, 727, 248, 267, 1242, 346), "0.803"),
    ((400, 5451, 4554, 658, 239, 238, 1135, 328), (400, 5451, 4416, 760, 275, 298, 1333, 347), "<0.001"),
    ((400, 5451, 4513, 687, 251, 279, 1217, 350), (400, 5451, 4044, 1015, 392, 383, 1790, 369), "<0.001"),
)


def test_random_corpora_as_recorded(texts):
    refs, unrelated, pairs = texts
    assert tuple(sctk.counts(refs, unrelated)) == RECORDED_UNRELATED
    for (a, b), recorded in zip(pairs, RECORDED, strict=True):
        found = (*(tuple(sctk.counts(refs, hyps)) for hyps in (a, b)), sctk.printed(mapsswe(refs, a, b).p_sctk))
        assert found == recorded


def test_random_corpora(installed, texts, tmp_path):
    refs, unrelated, pairs = texts
    check_counts(tmp_path, "unrelated", refs, unrelated)
    seen = set()
    for a, b in pairs:
        check_counts(tmp_path, "a", refs, a)
        check_counts(tmp_path, "b", refs, b)
        seen.add(check_mapsswe(tmp_path, refs, a, b) == "<0.001")
    assert seen == {True, False}


@pytest.mark.data
@pytest.mark.parametrize("name", ["atis", "swbd", "l2"])
def test_real_lists(installed, data_dir, tmp_path, name):
    """First pass, and a variation of it whose difference is neither nothing nor overwhelming."""
    lists = list(read_nbest(data_dir / name / f"{sctk.LISTS[name]}.jsonl"))
    found = sctk.compare(lists, tmp_path)
    assert all(system["equal"] for system in found["systems"].values()) and len(found["systems"]) == 2
    (pair,) = found["pairs"]
    assert pair["equal"] and 1e-6 < pair["p"] < 1
