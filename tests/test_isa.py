"""The choice of the instruction set: forced, absent, unknown, and by default the best."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowbit import LowbitError, isa, ops

ALL = ["scalar", "neon", "avx2", "avx512", "amx"]


def run_with(value: str, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LOWBIT_ISA": value, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_scalar_is_always_there_and_the_best_comes_last():
    names = ops.available_isas()
    assert names[0] == "scalar" and [n for n in ALL if n in names] == names
    if not os.environ.get("LOWBIT_ISA"):
        assert isa() == names[-1]


@pytest.mark.parametrize("name", ops.available_isas())
def test_environment_forces_one(name):
    code = (
        "import torch, lowbit; q = lowbit.quantize(torch.eye(8), 8)\n"
        "lowbit.linear(torch.ones(1, 8), q); print(lowbit.isa())"
    )
    done = run_with(name, code)
    assert done.returncode == 0 and done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("name, why", [("neon", "lacks it"), ("avx2", "lacks it"), ("sse9", "is unknown")])
def test_what_this_machine_lacks_is_an_error_at_first_use(name, why):
    if name in ops.available_isas():
        pytest.skip(f"this machine has {name}")
    code = (
        "import torch, lowbit; q = lowbit.quantize(torch.eye(8), 8)\n"
        "for f in (lowbit.isa, lambda: lowbit.linear(torch.ones(1, 8), q)):\n"
        "    try: f()\n"
        "    except lowbit.LowbitError as e: print(e)\n"
    )
    done = run_with(name, code)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1, done.stdout + done.stderr
    assert lines[0].startswith(f"LOWBIT_ISA={name}") and why in lines[0] and "scalar" in lines[0]


def test_set_isa_switches_and_goes_back():
    before = isa()
    try:
        ops.set_isa("scalar")
        assert isa() == "scalar"
        with pytest.raises(LowbitError, match="isa sse9 is unknown; this machine has scalar"):
            ops.set_isa("sse9")
        assert isa() == "scalar"
    finally:
        ops.set_isa(None)
    assert isa() == before
