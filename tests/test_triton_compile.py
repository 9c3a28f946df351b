"""The kernels compiled ahead of time for GPUs that need not be there: nothing spills, tensor cores are used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lowbit.kernels.aot import OTHERS
from lowbit.kernels.config import BUCKETS

ARCHS = {80: 163 * 1024, 90: 227 * 1024}  # shared memory a program may have (CUDA programming guide, table 27)


def missing_tool() -> str | None:
    """What keeps Triton from compiling here, if anything; asked of the file system, because importing Triton
    here would settle for the whole test process whether kernels are interpreted."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "Triton is not installed: pip install 'lowbit[gpu]'"
    folder = os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin")
    tools = {"ptxas": "TRITON_PTXAS_PATH", "cuobjdump": "TRITON_CUOBJDUMP_PATH"}
    absent = [t for t, v in tools.items() if not os.path.exists(os.environ.get(v) or os.path.join(folder, t))]
    return f"this build of Triton brings no {' and no '.join(absent)}" if absent else None


def aot(*args: str, **env: str) -> subprocess.CompletedProcess:
    """`python -m lowbit.kernels.aot` without the interpreter, which other tests switch on."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lowbit.kernels.aot", *args]
    return subprocess.run(command, env=inherited | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What `lowbit.kernels.aot` says about one kernel of each kind."""
    if reason := missing_tool():
        pytest.skip(reason)
    done = aot("--arch", *map(str, ARCHS), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_registers_spills_and_shared_memory(compiled):
    assert {kernel["arch"] for kernel in compiled} == set(ARCHS)
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        # 65,536 registers a multiprocessor: at least two programs of 4 warps or one of 8; at 128, four of 4.
        single = kernel["table"] in OTHERS[:1] or ("bucket" in kernel and BUCKETS[kernel["bucket"]] == 1)
        assert kernel["registers"] <= (128 if single else 255), kernel
        assert kernel["shared"] <= ARCHS[kernel["arch"]], kernel


@pytest.mark.slow
def test_products_run_on_tensor_cores(compiled):
    """Warp-group products on sm_90, warp-level ones on sm_80, none in the single-row kernel."""
    for kernel in (k for k in compiled if k["table"] not in OTHERS):
        single = BUCKETS[kernel["bucket"]] == 1
        assert bool(kernel["wgmma"]) == (not single and kernel["arch"] == 90), kernel
        assert bool(kernel["mma"]) == (not single and kernel["arch"] == 80), kernel


@pytest.mark.slow
def test_the_interpreter_is_refused():
    if reason := missing_tool():
        pytest.skip(reason)
    done = aot("--arch", "90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr and not done.stdout
