"""Measured choices of kernels: the file that `lowbit tune` writes and the kernels read; no GPU is needed."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels import config, tuned
from lowbit.kernels.config import BUCKETS, CONFIGS, ROUTES, KernelConfig
from lowbit.tools import tune


@pytest.fixture
def tables(monkeypatch):
    """The tables as copies: what a test applies, it alone sees."""
    monkeypatch.setattr(tuned, "ROUTES", dict(ROUTES))
    monkeypatch.setattr(tuned, "CONFIGS", dict(CONFIGS))
    return tuned


def test_choices_are_applied(tables, tmp_path):
    wanted = KernelConfig(64, 128, 128, 8, 2)
    path = tmp_path / "new" / "t.json"
    tuned.write(path, "G 1", {(2, 3): ("triton", wanted), (4, 5): ("cuda", CONFIGS[4, 5])})
    tuned.apply(tuned.read(path, "G 1"))
    assert tables.ROUTES[2, 3] == "triton" and tables.CONFIGS[2, 3] == wanted
    assert tables.ROUTES[4, 5] == "cuda" and tables.ROUTES[4, 3] == ROUTES[4, 3]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1, "gpu": "G", "choices": [{}]}', '{"version": 1, "gpu": "G", "choices": 3}',
     '{"version": 2, "gpu": "G", "choices": []}',
     '{"version": 1, "gpu": "G", "choices": [{"bits": 3, "most_rows": 1, "route": "cuda", "triton": {}}]}',
     '{"version": 1, "gpu": "G", "choices": [{"bits": 2, "most_rows": 1, "route": "cuda", "triton": {"block_m": 3}}]}'],
)  # fmt: skip
def test_a_damaged_file_is_named(text, tables, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(LowbitError, match=r"t\.json: (no file of lowbit tune|not JSON)"):
        tuned.read(path, "G")


def test_another_gpu_is_refused(tmp_path):
    path = tmp_path / "t.json"
    tuned.write(path, "A", {})
    with pytest.raises(LowbitError, match="measured on 'A', this is 'B'"):
        tuned.read(path, "B")


def test_where_choices_are_kept(tables, monkeypatch, tmp_path):
    """The cache folder, the variable's file, which must exist, or nowhere."""
    name = "NVIDIA H100 80GB HBM3"
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    path = tmp_path / "lowbit" / "tuned-nvidia-h100-80gb-hbm3.json"

    def applied():
        tuned.apply_once.cache_clear()
        return tuned.apply_once(device)

    assert tuned.default_path(name) == path and applied() is None
    tuned.write(path, name, {(1, 0): ("triton", CONFIGS[1, 0])})
    monkeypatch.setenv(tuned.VARIABLE, "off")
    assert applied() is None and tables.ROUTES[1, 0] == "cuda"
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(LowbitError, match=r"missing.json: cannot read: .* \(LOWBIT_GPU_TUNING=off ignores it\)"):
        applied()
    monkeypatch.delenv(tuned.VARIABLE)
    assert applied() == path and tables.ROUTES[1, 0] == "triton"
    tuned.apply_once.cache_clear()


@pytest.fixture
def measured(tables, monkeypatch):
    """`lowbit tune` with a GPU and times that are made up: Triton wins at 64 rows, the first candidate elsewhere."""
    calls = []

    def measure(bits, bucket, rows, say):
        calls.append((bits, rows))
        for i, (route, tiles) in enumerate(tune.candidates(bits, bucket, rows)):
            yield (0.5e-6 if route == "triton" and rows == 64 else 1e-6 + i * 1e-7), route, tiles

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "G 1")
    monkeypatch.setattr("lowbit.kernels.cuda.module", lambda: object())
    monkeypatch.setattr("lowbit.kernels.cuda.has_wgmma", lambda device: True)
    return calls


def test_tuning_keeps_what_it_has_measured(measured, tmp_path, capsys):
    out = tmp_path / "cache" / "t.json"  # in a folder that is not there yet
    assert tune.main(["--bits", "2", "--out", str(out)]) == 0
    assert len(measured) == len(BUCKETS)
    assert tune.main(["--bits", "2", "4", "--out", str(out), "--json"]) == 0
    assert {bits for bits, _ in measured[len(BUCKETS) :]} == {4}
    result = json.loads(capsys.readouterr().out.split("kept in")[-1].split("\n", 1)[-1])
    assert result["gpu"] == "G 1" and len(result["measured"]) == len(BUCKETS)
    found = tuned.read(out, "G 1")
    assert set(found) == {(bits, bucket) for bits in (2, 4) for bucket in range(len(BUCKETS))}
    assert found[2, 0][0] == "cuda" and found[2, 2][0] == "triton"
    assert any(name.startswith("wgmma") for case in result["measured"] for name in case["us"])
    assert tune.main(["--bits", "2", "--force", "--out", str(out)]) == 0 and len(measured) == 3 * len(BUCKETS)


def test_an_interrupted_run_goes_on(measured, monkeypatch, tmp_path):
    out, whole = tmp_path / "t.json", tune.measure

    def fails_at_4(bits, *rest):
        if bits == 4:
            raise KeyboardInterrupt
        return whole(bits, *rest)

    monkeypatch.setattr(tune, "measure", fails_at_4)
    assert tune.main(["--bits", "2", "4", "--out", str(out)]) == 130
    assert {bits for bits, _ in tuned.read(out, "G 1")} == {2}


def test_where_nothing_runs(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "measure", lambda *_: iter(()))
    assert tune.main(["--bits", "2", "--out", str(tmp_path / "t.json")]) == 2
    assert "no kernel of 2 bits runs here with 1 rows" in capsys.readouterr().err


@pytest.mark.parametrize("built", [False, True])
def test_candidates_are_few_and_valid(built, monkeypatch):
    monkeypatch.setattr("lowbit.kernels.cuda.module", lambda: object() if built else None)
    monkeypatch.setattr("lowbit.kernels.cuda.has_wgmma", lambda device: True)
    for bits in (1, 2, 4, 8):
        for bucket, most in enumerate(BUCKETS):
            found = list(tune.candidates(bits, bucket, most or 4096))
            assert 2 <= len(found) <= 10
            for route, entry in found:
                assert (route in config.ROUTE_NAMES if built else route == "triton") and entry.block_n % 16 == 0
                assert (entry.block_m <= 16) == (most is not None and most <= 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "measures on a CUDA GPU" in capsys.readouterr().err
