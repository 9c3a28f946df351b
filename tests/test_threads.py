"""Threads: how many, forked children, several callers at once, and torch's own threads at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit import LowbitError, get_threads, linear, ops, quantize, set_threads

# Large enough that every call wants a team: M * N * K of at least 2 ** 19.
SHAPE = (2048, 512)


@pytest.fixture
def two_threads():
    set_threads(2)
    yield
    set_threads(None)


def python(code: str, **env: str) -> str:
    """Output of ``code`` in a fresh interpreter, killed where it hangs."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2", **env}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_default_is_torchs_and_choices_are_checked():
    assert get_threads() <= max(1, torch.get_num_threads())
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(LowbitError, match="threads must be a positive integer"):
            set_threads(bad)
    set_threads(3)
    assert get_threads() == 3
    set_threads(None)
    assert get_threads() <= max(1, torch.get_num_threads())


def test_choice_holds_in_every_thread(two_threads):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_threads).result() == 2


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_several_callers_at_once(two_threads, compute, rows):
    """One gets the team, the others work alone; all get what one thread gets, to the last bit."""
    q = quantize(torch.randn(SHAPE), 4, group=128)
    inputs = [torch.randn(rows, SHAPE[1]) for _ in range(8)]
    set_threads(1)
    expected = [linear(x, q, compute=compute) for x in inputs]
    set_threads(2)
    start = threading.Barrier(4)

    def work(which: int) -> bool:
        start.wait()
        return all(
            torch.equal(linear(inputs[i % 8], q, compute=compute), expected[i % 8]) for i in range(which, which + 12)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("warm", ["torch", "lowbit", "both"])
def test_forked_child_computes_alone_and_does_not_hang(warm):
    code = f"""
import os, warnings
warnings.simplefilter("ignore")
import torch, lowbit
from lowbit import ops
warm = {warm!r}
q, x = lowbit.quantize(torch.randn{SHAPE}, 2), torch.randn(4, {SHAPE[1]})
ops.packed(q)
big = torch.randn(400, 400)
if warm in ("torch", "both"):
    big @ big; (torch.randn(1 << 20) * 2).sum()
if warm in ("lowbit", "both"):
    lowbit.linear(x, q)
expected = None if warm == "torch" else lowbit.linear(x, q)
child = os.fork()
if child == 0:
    y = lowbit.linear(x, q)
    good = lowbit.get_threads() == 1 and (expected is None or torch.equal(y, expected))
    os._exit(0 if good else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lowbit.get_threads())
"""
    assert python(code) == "0 2"


def test_one_pool_with_torch():
    """Alternating torch and lowbit regions in one process starts no second set of workers."""
    code = f"""
import os, torch, lowbit
torch.set_num_threads(2)
q, x = lowbit.quantize(torch.randn{SHAPE}, 4), torch.randn(40, {SHAPE[1]})
big = torch.randn(1 << 20)
def tasks(): return len(os.listdir("/proc/self/task"))
before = tasks()
big.mul_(1.0)
with_torch = tasks()
for _ in range(3):
    lowbit.linear(x, q); big.mul_(1.0)
print(with_torch - before <= 1 and tasks() == with_torch)
"""
    assert python(code) == "True"


def test_environment_limits_the_team():
    assert python("import lowbit; print(lowbit.get_threads())", OMP_NUM_THREADS="1") == "1"


@pytest.mark.parametrize("isa", ops.available_isas())
def test_any_team_gives_the_same(isa):
    q, x = quantize(torch.randn(1030, 512), 2), torch.randn(70, 512)
    ops.set_isa(isa)
    try:
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append((linear(x, q), linear(x[:1], q), linear(x, q, compute="exact")))
    finally:
        set_threads(None)
        ops.set_isa(None)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
