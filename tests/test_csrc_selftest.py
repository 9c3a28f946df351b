"""csrc/selftest.cpp: the kernels without Python, under sanitizers and on another machine's instruction set.

Each build has its folder below build/, where only what changed is compiled anew.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.ops import available_isas

ROOT = Path(__file__).resolve().parents[1]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def tool(name: str) -> str:
    """Path of ``name``, beside this interpreter or in PATH; skips the test where there is none."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def build(folder: str, *options: str) -> Path:
    """The self-test, compiled at -O1 with CMake ``options``: its path."""
    path = ROOT / "build" / folder
    path.mkdir(parents=True, exist_ok=True)
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DLOWBIT_PYTHON=OFF", "-DLOWBIT_SELFTEST=ON", *options,
    ]  # fmt: skip
    with open(path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of test runs at the same time, one builds
        (path / "CMakeCache.txt").unlink(missing_ok=True)  # compilers and tools may have moved since
        for command in (configure, [tool("cmake"), "--build", str(path), "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout[-5000:]
    return path / "lowbit_selftest"


def run(*command: str) -> dict[str, int]:
    """Runs the self-test: cases of each instruction set; none may be wrong."""
    # Passive: a team larger than the machine must not spin.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return {name: int(cases) for name, cases in re.findall(r"^(\w+): (\d+) cases, 0 wrong", done.stdout, re.M)}


@pytest.mark.slow
def test_kernels_under_sanitizers():
    """Every instruction set of this machine under AddressSanitizer and UndefinedBehaviorSanitizer."""
    cases = run(str(build("selftest-sanitized", "-DLOWBIT_SANITIZE=address,undefined")))
    assert sorted(cases) == sorted(available_isas())
    assert min(cases.values()) > 1000


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one; the other tests run NEON on it")
def test_neon_kernels_in_an_emulator():
    compiler, emulator = tool(CROSS), tool(EMULATOR)
    asked = subprocess.run([compiler, "-print-file-name=libgomp.a"], stdout=subprocess.PIPE, text=True, check=True)
    program = build(
        "selftest-neon", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
        f"-DOpenMP_gomp_LIBRARY={asked.stdout.strip()}",
    )  # fmt: skip
    cases = run(emulator, str(program))
    assert sorted(cases) == ["neon", "scalar"]
    assert min(cases.values()) > 1000
