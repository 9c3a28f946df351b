"""Run stages one after another, each once: what demo and reproduce are made of.

A stage is repeated only if its arguments or the bytes of its inputs changed since it last ended well, or an output is
gone; its result stands as JSON beside its outputs. Killed at any point, the pipeline goes on with the stage it was in.
Several processes may work in one folder: a stage is run by one of them.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from lowbit.files import locked, read_json, write_json
from lowbit.tools import cli

_RESUMABLE = ("train", "sensitivity", "nas", "admm")  # stages with a state of their own, and so with --restart


class Busy(Exception):
    """Another process runs the stage."""


class Pipeline:
    """Stages that work in one folder.

    Args:
        out: folder of all outputs; made if absent.
        restart: forget what is done.

    Attributes:
        wait: for the end of a stage that another process runs; otherwise :class:`Busy` is raised.
    """

    def __init__(self, out: str | Path, restart: bool = False):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._stamps = self.out / "stages.json"
        self._commands: dict[str, str] = {}
        self.restart, self.wait = restart, True
        if restart:
            self._stamps.unlink(missing_ok=True)

    def path(self, name: str) -> str:
        """A file in the folder."""
        return str(self.out / name)

    def run(self, key: str, stage: str, argv: Sequence[str], inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """Run ``lowbit STAGE ARGV`` unless it is done; returns its result.

        Args:
            key: name of the step; its result is kept as ``KEY.json``.
            inputs, outputs: files that it reads and writes.

        Raises:
            LowbitError: the stage's own.
        """
        command = f"lowbit {stage} {' '.join(argv)}"
        arguments = [*argv, "--restart"] if self.restart and stage in _RESUMABLE else list(argv)

        def work() -> dict[str, Any]:
            module = importlib.import_module(f"lowbit.tools.{stage}")
            with contextlib.redirect_stdout(sys.stderr):
                return module.body(module.parser().parse_args(arguments)) or {}

        return self.once(key, command, work, inputs, outputs)

    def once(
        self, key: str, command: str, work: Callable[[], dict[str, Any]], inputs: Sequence[str], outputs: Sequence[str]
    ) -> Any:
        """Call ``work`` unless it is done; returns its result. ``command`` says what it does; see :meth:`run`.

        Raises:
            Busy: another process is at it, and ``wait`` is off.
        """
        with locked(self.out / ".locks" / key, self.wait, Busy):
            result = self._once(key, command, work, inputs, outputs)
        self._commands[key] = command
        return result

    def _once(
        self, key: str, command: str, work: Callable[[], dict[str, Any]], inputs: Sequence[str], outputs: Sequence[str]
    ) -> Any:
        record = {"command": command, "inputs": {_input_name(i): file_hash(i) for i in inputs}}
        result_file = self.out / f"{key}.json"
        done = self._done().get(key) == record and result_file.is_file() and all(Path(o).is_file() for o in outputs)
        if done:
            return read_json(result_file)
        print(f"[{key}] {command}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        result = cli.finite(work())
        result["stage_seconds"] = round(time.perf_counter() - started, 2)
        write_json(result_file, result)
        with locked(self._stamps):
            write_json(self._stamps, self._done() | {key: record})
        return result

    def _done(self) -> dict[str, Any]:
        """The record of every stage that ended well, whichever process ran it."""
        return read_json(self._stamps) if self._stamps.is_file() else {}

    def commands(self) -> list[str]:
        """The command lines that made what was asked for, in that order."""
        return list(self._commands.values())


def _input_name(path: str) -> str:
    """A file of the package goes by its name there: another installation of the same bytes repeats nothing."""
    package = Path(__file__).parent
    file = Path(path)
    return f"lowbit/tools/{file.relative_to(package).as_posix()}" if file.is_relative_to(package) else path


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    import lowbit

    return {
        "python": platform.python_version(), "torch": torch.__version__, "isa": lowbit.isa(),
        "threads": torch.get_num_threads(), "platform": platform.platform(),
    }  # fmt: skip


def file_hash(path: str | Path) -> str:
    """xxh3_64 of a file's bytes."""
    state = xxhash.xxh3_64()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()
