"""CUDA kernels compiled for GPUs that need not be there: no spills, registers and shared memory that fit, few enough
instructions a weight; and what LOWBIT_CUDA asks of the build."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def missing_tool() -> str | None:
    if not shutil.which("nvcc"):
        return "nvcc is not installed"
    if shutil.which("cuobjdump") or importlib.util.find_spec("triton"):
        return None
    return "cuobjdump is not installed, nor Triton, which brings one"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    if reason := missing_tool():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("roofline") / "r.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "bench/gpu_roofline.py", "--arch", "80", "90", "--variants", "small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["kernels"]


@pytest.mark.slow
def test_nothing_spills_and_blocks_fit(kernels):
    assert {k["arch"] for k in kernels} == {80, 90}
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 255 and kernel["blocks_per_sm"] >= 1, kernel
        assert kernel["of_which"]["HMMA"] > 0, kernel
        if kernel["kernel"].startswith("gemv"):
            # Little's law: 3.35e12 bytes/s * 0.7 us / 132 multiprocessors = 18 KB.
            assert kernel["blocks_per_sm"] >= 2 and kernel["in_flight_per_sm"] >= 16 * 1024, kernel
            assert kernel["of_which"]["LDG"] > 0 and kernel["instructions_per_weight"] < 4.5, kernel


@pytest.mark.slow
def test_issue_slots_do_not_bound_the_plain_kernel(kernels):
    """4 bits, one row, fp16: an instruction budget of at least twice what the memory's bandwidth needs."""
    (kernel,) = (k for k in kernels if k["kernel"] == "gemv 4 bits Fp16 M<=8" and k["arch"] == 90)
    assert kernel["instructions_per_weight"] <= 1.7 and kernel["issue_bound_share"] >= 2


@pytest.mark.parametrize(
    ("wish", "path", "wanted"),
    [("off", True, "False"), ("on", False, "LOWBIT_CUDA=on needs nvcc"), ("maybe", True, "must be auto, on or off")],
)
def test_what_the_build_is_asked(wish, path, wanted, tmp_path):
    """setup.py's decision, with and without nvcc on PATH."""
    code = (ROOT / "setup.py").read_text().split("class CMakeBuild")[0] + "\nprint(wants_cuda())"
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    env = {"PATH": str(tmp_path) if path else "/nonexistent", "LOWBIT_CUDA": wish}
    script = tmp_path / "decide.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert wanted in done.stdout + done.stderr
