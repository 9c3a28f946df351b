"""CUDA kernels compiled for GPUs that need not be there: no spills, registers and shared memory that fit, few enough
instructions a weight; and what LOWBIT_CUDA asks of the build."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
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


def check_kernel(kernel: dict) -> None:
    """What every kernel has to keep to, on every architecture."""
    # Shared memory of a block: 163 KiB on sm_80, 227 on sm_90, but 99 on sm_86 and sm_89, which run sm_80's code
    # (CUDA programming guide, technical specifications).
    most = 227 * 1024 if "wgmma" in kernel["kernel"] else 99 * 1024
    assert kernel["spilled"] == 0 and kernel["stack"] == 0 and kernel["shared"] <= most, kernel
    assert kernel["registers"] <= 255 and kernel["blocks_per_sm"] >= 1 and kernel["tensor"] > 0, kernel
    # From sm_90 on a kernel waits for the one before it, and reads nothing before.
    assert kernel["waits"] == (kernel["arch"] >= 90) and kernel["early_loads"] == 0, kernel
    if kernel["kernel"].startswith("gemv"):
        # Little's law: 3.35e12 bytes/s * 0.7 us / 132 multiprocessors = 18 KB.
        assert kernel["blocks_per_sm"] >= 2 and kernel["in_flight_per_sm"] >= 16 * 1024, kernel
        assert kernel["instructions_per_weight"] < 6, kernel
    assert kernel["copies"] > 0 and not kernel["serialized"], kernel


@pytest.mark.slow
def test_nothing_spills_and_blocks_fit(kernels):
    assert {k["arch"] for k in kernels} == {80, 90}
    for kernel in kernels:
        check_kernel(kernel)


@pytest.mark.slow
def test_issue_slots_do_not_bound_the_plain_kernel(kernels):
    """4 bits, one row, fp16: an instruction budget of at least twice what the memory's bandwidth needs."""
    (kernel,) = (k for k in kernels if k["kernel"] == "gemv 4 bits Fp16 M<=8" and k["arch"] == 90)
    assert kernel["instructions_per_weight"] <= 1.7 and kernel["bound"] >= 2


def test_the_committed_figures_are_of_these_sources():
    """Every kernel was compiled for both architectures, from the code as it is now, and keeps to the bounds."""
    roofline = runpy.run_path(str(ROOT / "bench" / "gpu_roofline.py"))
    committed = json.loads((ROOT / "docs" / "results" / "gpu_roofline.json").read_text())
    again = "python bench/gpu_roofline.py --arch 80 90 --out docs/results/gpu_roofline.json --page docs/KERNELS_GPU.md"
    assert committed["sources"] == roofline["digest"](), f"csrc/cuda has changed: {again}"
    every = [(arch, roofline["label"](kernel)) for arch in (80, 90) for kernel in roofline["kernels"](False, arch)]
    assert [(k["arch"], k["kernel"]) for k in committed["kernels"]] == every
    for kernel in committed["kernels"]:
        check_kernel(kernel)
    page = (ROOT / "docs" / "KERNELS_GPU.md").read_text()
    for kind, table in roofline["tables"](committed["kernels"]).items():
        assert table in page, f"the table {kind} is another: {again}"


def decided(tmp_path: Path, env: dict[str, str], code: str = "print(wants_cuda())") -> str:
    """What setup.py's decision prints."""
    script = tmp_path / "decide.py"
    script.write_text((ROOT / "setup.py").read_text().split("class CMakeBuild")[0] + "\n" + code)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("wish", "nvcc", "wanted"),
    [
        ("off", True, "False"), ("on", True, "True"), ("on", False, "LOWBIT_CUDA=on needs nvcc"),
        ("maybe", True, "must be auto, on or off"), ("auto", False, "False"),
    ],
)  # fmt: skip
def test_what_the_build_is_asked(wish, nvcc, wanted, tmp_path):
    """setup.py's decision, with and without nvcc on PATH."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    found = decided(tmp_path, {"PATH": str(tmp_path) if nvcc else "/nonexistent", "LOWBIT_CUDA": wish})
    assert wanted in found and "Traceback" not in found


@pytest.mark.parametrize(("device", "built"), [("nvidia3", True), ("dxg", True), ("nvidiactl", False), (None, False)])
def test_auto_builds_where_a_gpu_is(device, built, tmp_path):
    (tmp_path / "dev").mkdir()
    if device:
        (tmp_path / "dev" / device).touch()
    code = f"import functools; has_gpu = functools.partial(has_gpu, {str(tmp_path / 'dev')!r}); print(wants_cuda())"
    found = decided(tmp_path, {"PATH": "/nonexistent", "CUDACXX": "/some/nvcc"}, code)
    assert found.splitlines()[-1] == str(built)
    assert ("no NVIDIA GPU: not building lowbit._CUDA (LOWBIT_CUDA=on builds it)" in found) is not built
