"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer (csrc/selftest.cpp), in a build of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def find(name: str) -> str:
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.sanitizer
def test_kernels_under_sanitizers(tmp_path):
    configure = [
        find("cmake"), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja')}",
        "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DLOWBIT_SANITIZE=address,undefined",
        "-DLOWBIT_PYTHON=OFF", "-DLOWBIT_SELFTEST=ON",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run([find("cmake"), "--build", str(tmp_path), "--parallel", "2"], check=True, capture_output=True)
    done = subprocess.run(
        [str(tmp_path / "lowbit_selftest")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar: " in done.stdout
