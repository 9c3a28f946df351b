"""bench/report.py and bench/ceilings.py on a made-up record: rates, bounds, the acceptance table, the files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.errors import LowbitError

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, ceilings = load("report"), load("ceilings")

RUN = {"kind": "run", "processor": "P", "isa": "amx", "threads": 2, "torch": "2", "onnxruntime": None, "quick": True}
PROBE = {
    "kind": "probe",
    "read": {"1048576": 100e9, "1073741824": 10e9},
    "one_stream": {"1048576": 100e9, "1073741824": 8e9},
    "peak": {"threads": 2, "amx": 10e12, "vnni": 1e12},
}


def cell(n=4096, k=4096, bits=4, m=1, us=1000.0, cold=False, fp32=8.0, **more) -> dict:
    return {
        "kind": "cell", "id": f"{n}-{k}-{bits}-{m}-{cold}-{more}", "n": n, "k": k, "bits": bits, "m": m, "cold": cold,
        "isa": "amx", "group": None, "table": None, "compute": "int8", "kernel": "x", "us": us, "us_low": 0.9 * us,
        "us_high": 1.1 * us, "rounds": 7, "nbytes": n * k * bits // 8, "operations": 2 * m * n * k,
        "copies": 100 if cold else 1, "absent": {"ONNX Runtime": "not installed"},
        "peers": {"torch fp32": {"us": fp32 * us, "ratio": [fp32 - 1, fp32, fp32 + 1]}}, **more,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_record(*rows: dict) -> Path:
        path = tmp_path / "kernels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_record


def test_rates_and_bounds(write):
    memory, arithmetic = report.load(write(RUN, PROBE, cell(cold=True), cell(m=256)))["cells"]
    # 8 MiB at 10 GB/s (the set of 100 copies is DRAM's) take 0.84 ms, x and y a little more.
    assert memory["bound"] == "read" and memory["percent"] == pytest.approx(84.2, abs=0.1)
    assert memory["percent_one_stream"] == pytest.approx(memory["percent"] * 10 / 8)
    assert memory["gbps"] == pytest.approx(8.39, abs=0.01) and memory["spread"] == pytest.approx(20)
    # 8.6 G multiply-adds' worth of operations at 10 TOP/s.
    assert arithmetic["bound"] == "amx" and arithmetic["percent"] == pytest.approx(85.9, abs=0.1)


def test_reads_of_the_same_rounds_replace_the_probe(write):
    reads = {"one stream 0": [90, 100, 110], "one stream 1": [70, 80, 90], "streams 2": [60, 70, 80]}
    row = cell(cold=True, reads=reads, read_nbytes=1 << 30)
    moved = row["nbytes"] + 4 * 2 * 4096
    (memory,) = report.load(write(RUN, PROBE, row))["cells"]
    assert memory["percent"] == pytest.approx(100 * 70 * moved / (1 << 30))
    assert memory["percent_one_stream"] == pytest.approx(100 * 80 * moved / (1 << 30))


@pytest.mark.slow
def test_a_reader_reads_in_every_way(tmp_path):
    calls = ceilings.Reader(tmp_path, threads=1).calls()
    assert [name.startswith("one stream") for name in calls] == [True, True, False]
    for call in calls.values():
        call()


def test_a_ceiling_is_the_best_of_all_probes(write):
    better = {**PROBE, "read": {"1048576": 50e9, "1073741824": 20e9}}
    assert report.load(write(RUN, PROBE, better))["ceilings"]["read"] == {1 << 20: 100e9, 1 << 30: 20e9}


def test_a_missing_peak_leaves_the_memory_bound():
    limits = ceilings.Ceilings({1 << 20: 1e9}, {1 << 20: 1e9}, {}, 1)
    assert limits.bound(1e6, 1e15, 1e6, "amx") == ceilings.Bound(1e-3, "read")


def test_acceptance_says_what_holds_what_fails_and_what_is_missing(write):
    costs = [{"kind": "cost", "id": "overhead", "us": 5.0}]
    rows = report.sibling("acceptance").rows(report.load(write(RUN, PROBE, cell(cold=True), *costs)))
    verdict = {row[0]: row[2:] for row in rows}
    what = "GEMV 4096 x 4096 cold, 4 bits"
    assert verdict[f"{what}: share of the fastest way to read"] == ["84.2 %", "no"]
    assert verdict[f"{what}: share of what one stream a core reads"] == ["105 %", "yes"]
    assert verdict[f"{what}: over torch fp32"] == ["8 times", "yes"]
    assert verdict["GEMV 4096 x 4096 cold, 1 bits: over torch fp32"] == ["not measured", ""]
    assert verdict["call overhead over the native kernel"] == ["5.00 us", "no"]


def test_documents(write, tmp_path, capsys):
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "KERNELS.md").write_text("before\n<!-- begin measured -->\nstale\n<!-- end measured -->\nafter\n")
    path = write(RUN, PROBE, cell(), cell(m=256), cell(cold=True))
    assert report.main([str(path), "--docs", str(docs)]) == 0
    text = (docs / "KERNELS.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text and "4096 x 4096" in text
    assert len(json.loads((docs / "results" / "kernels.json").read_text())["cells"]) == 3
    assert (docs / "results" / "kernels.png").stat().st_size > 1000
    assert (docs / "results" / "kernels.md").read_text().count("\n| 4096 x 4096") == 3
    assert "torch fp32" in capsys.readouterr().out


def test_another_machine_has_files_and_a_section_of_its_own(write, tmp_path):
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    first = "<!-- begin measured -->\nfirst\n<!-- end measured -->\n"
    (docs / "KERNELS.md").write_text(first + "<!-- begin measured-zen -->\nstale\n<!-- end measured-zen -->\n")
    assert report.main([str(write(RUN, PROBE, cell(m=256))), "--docs", str(docs), "--name", "zen"]) == 0
    text = (docs / "KERNELS.md").read_text()
    assert text.startswith(first) and "stale" not in text and "results/kernels-zen.json" in text
    assert sorted(f.name for f in (docs / "results").iterdir()) == [f"kernels-zen.{s}" for s in ("json", "md", "png")]


def test_what_is_no_record_is_named(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")
    with pytest.raises(LowbitError, match=r"x\.jsonl: not a record of make bench"):
        report.load(path)
    path.write_text("{\n")
    assert report.main([str(path)]) == 2
    assert "not a record of make bench" in capsys.readouterr().err
