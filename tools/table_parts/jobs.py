"""Several processes on one table: small models train faster one to a core than one on all cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.tools import cli
from lowbit.tools.table_parts.config import TableConfig
from lowbit.tools.table_parts.run import Table


def threads_of_job(jobs: int) -> int:
    """CPU threads of each of several processes.

    Raises:
        LowbitError: more processes than threads.
    """
    threads = torch.get_num_threads()
    if not 1 <= jobs <= threads:
        raise LowbitError(f"--jobs {jobs}: from 1 to the {threads} threads that PyTorch uses")
    return threads // jobs


def run_shared(data: str, config: TableConfig, out: str, restart: bool, jobs: int) -> None:
    """Run all stages of a table by ``jobs`` processes, this one among them; the others print into OUT/job-N.log.

    Raises:
        LowbitError: a stage's own; a number of processes that this machine has no threads for.
    """
    threads, before = threads_of_job(jobs), torch.get_num_threads()
    table = Table(data, config, out, restart)
    torch.set_num_threads(threads)  # our kernels follow
    try:
        with _helpers((data, config, out, restart, threads), jobs):
            table.run_shared()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _helpers(arguments: tuple[Any, ...], jobs: int) -> Iterator[None]:
    """All processes but this one; they end with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of the threads of this one
    processes = [context.Process(target=_help, args=(i, *arguments), daemon=True) for i in range(2, jobs + 1)]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.terminate()  # nothing to one that has ended; a training saves its state
        for process in processes:
            process.join()


def _help(number: int, data: str, config: TableConfig, out: str, restart: bool, threads: int) -> None:
    """A further process. It ends with its parent, even one that was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    with open(Path(out) / f"job-{number}.log", "a") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    table = Table(data, config, out)
    table.pipeline.restart = restart
    sys.exit(cli.guard("lowbit reproduce", table.run_shared))
