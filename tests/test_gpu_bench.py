"""bench/gpu.sh and what it runs, as far as they go without a GPU: the plan, exit codes, the benchmarks' dry runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


def bench(*command: str, **env: str) -> subprocess.CompletedProcess:
    inherited = os.environ | {"PYTHON": sys.executable} | env
    return subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True)


def test_the_plan_fits_into_nine_minutes():
    text = SCRIPT.read_text()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    assert set(limits) == {"build", "tests", "memcheck", "racecheck", "engine", "kernels"}
    total = int(re.search(r"^total=(\d+)", text, re.M)[1])
    assert sum(map(int, limits.values())) <= total == 540


def test_every_test_that_it_runs_exists():
    (names,) = re.findall(r"^for name in (.*?); do tests\+=", SCRIPT.read_text(), re.M)
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path):
    done = bench("bash", str(SCRIPT), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "PyTorch finds no CUDA GPU here; --dry-run does everything" in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_calls(tmp_path):
    done = bench("bash", str(SCRIPT), "--fast")
    assert done.returncode == 2 and "bench/gpu.sh [--dry-run] [--out runs/gpu]" in done.stderr
    done = bench("bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path / "out"), PYTHON="/bin/false")
    assert done.returncode == 2 and "has no PyTorch" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "last"),
    [("gpu_kernels", "the next step is a launch"), ("gpu_engine", "packed file and dense twin agree")],
)
def test_dry_runs(script, last):
    path = os.pathsep.join([str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = bench(sys.executable, f"bench/{script}.py", "--dry-run", PYTHONPATH=path)
    assert done.returncode == 0 and last in done.stdout.splitlines()[-1], done.stderr
