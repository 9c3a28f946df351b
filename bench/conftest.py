"""Options and the record of a benchmark run. Finished cells are kept, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import ceilings
import pytest
import torch

import lowbit
from lowbit import _C, tuning

ROOT = Path(__file__).resolve().parents[1]
PROBE_SECONDS = {True: 0.02, False: 0.1}  # a figure; by --quick


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowbit")
    group.addoption("--quick", action="store_true", help="a subset of the kernel benchmarks, in two minutes")
    group.addoption("--record", default=str(ROOT / "runs" / "bench"), help="folder of the results")


def version_of(name: str) -> str | None:
    try:
        return __import__(name).__version__
    except ImportError:
        return None


class Record:
    """A JSON-lines file: what ran, then one line a finished cell or probe. Results of other code are dropped."""

    def __init__(self, path: Path, quick: bool):
        self.path = path
        self.header = {
            "kind": "run", "extension": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16],
            "processor": tuning.processor(), "isa": lowbit.isa(), "isas": _C.available_isas(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "onnxruntime": version_of("onnxruntime"),
            "python": platform.python_version(), "quick": quick,
        }  # fmt: skip
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may have been cut off
        if not rows or rows[0] != self.header:
            rows = [self.header]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.done = {row.get("id") for row in rows}

    def add(self, **fields: Any) -> None:
        with open(self.path, "a") as stream:
            stream.write(json.dumps(fields) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def reader() -> ceilings.Reader:
    return ceilings.Reader(ROOT / "build" / "bench", torch.get_num_threads())


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, quick: bool):
    """The record of this run, with the machine's ceilings measured before and after."""
    folder = Path(request.config.getoption("--record"))
    result = Record(folder / ("kernels-quick.jsonl" if quick else "kernels.jsonl"), quick)
    threads = torch.get_num_threads()
    build = ROOT / "build" / "bench"
    result.add(kind="probe", **ceilings.probe(build, PROBE_SECONDS[quick], threads))
    yield result
    result.add(kind="probe", **ceilings.probe(build, PROBE_SECONDS[quick], threads))
    print(f"\nresults: {result.path}", file=sys.stderr)
