"""tools/training/allocator.py: freed memory is kept, where that can be asked for and nobody asked for anything else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.tools.training import allocator

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = THP.is_file() and "[never]" not in THP.read_text()

# Allocates, touches and frees 64 MiB ten times: page faults by kernel pages, and what the process holds before that.
CODE = """
import re
import resource
from lowbit.tools.training.allocator import keep_freed_memory, release_freed_memory
usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
before = usage().ru_maxrss
done = keep_freed_memory()
held = usage().ru_maxrss - before
bytes(bytearray(64 << 20))
faults = usage().ru_minflt
for _ in range(10):
    bytearray(b"x") * (64 << 20)
faults = usage().ru_minflt - faults
kept = int(open("/proc/self/statm").read().split()[1])
release_freed_memory()
released = kept - int(open("/proc/self/statm").read().split()[1])
again = keep_freed_memory()
block = bytearray(b"x") * (64 << 20)
huge = (re.findall(r"AnonHugePages: +([0-9]+)", open("/proc/self/smaps_rollup").read()) or [0])[0]
print(done, again, held, faults, released, huge)
"""


def run(**environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_the_reserve_costs_none():
    done, again, held, faults, released, _ = run()
    assert done == again == "True"
    assert int(held) < 20 << 10  # KiB, of a reserve of 1 GiB
    assert int(faults) < 10 * 16384 / 4  # 64 MiB are 16,384 pages of 4 KiB
    assert int(released) > 8192


@pytest.mark.skipif(not GLIBC or not HUGE, reason="the kernel has no huge pages, or gives them to nobody")
def test_the_next_stage_has_huge_pages_too():
    assert int(run()[-1]) > 32 << 10  # KiB of 64 MiB


@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_options_of_the_environment_stand(setting):
    assert run(**setting)[0] == "False"


def test_other_systems_are_left_alone(monkeypatch):
    def never(*_):
        raise AssertionError("called")

    monkeypatch.setattr(allocator.ctypes, "CDLL", never)
    with monkeypatch.context() as m:
        m.setattr(allocator.platform, "libc_ver", lambda: ("musl", "1.2"))
        assert allocator.keep_freed_memory() is False
        allocator.release_freed_memory()
    with monkeypatch.context() as m:
        m.setattr(allocator.sys, "platform", "darwin")
        assert allocator.keep_freed_memory() is False
