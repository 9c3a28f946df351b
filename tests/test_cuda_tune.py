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
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"gpu": "G 1", "choices": [tuned.choice(2, 3, "triton", wanted)]}))
    tuned.apply(path, "G 1")
    assert tables.ROUTES[2, 3] == "triton" and tables.CONFIGS[2, 3] == wanted
    assert tables.ROUTES[4, 3] == ROUTES[4, 3]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"gpu": "G", "choices": [{}]}', '{"gpu": "G", "choices": 3}',
     '{"gpu": "G", "choices": [{"bits": 3, "most_rows": 1, "route": "cuda", "triton": {}}]}'],
)  # fmt: skip
def test_a_damaged_file_is_named(text, tables, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(LowbitError, match=r"t\.json: no file of lowbit tune"):
        tuned.apply(path, "G")
    assert tables.ROUTES == ROUTES and tables.CONFIGS == CONFIGS


def test_another_gpu_is_refused(tables, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"gpu": "A", "choices": []}))
    with pytest.raises(LowbitError, match="measured on 'A', this is 'B'"):
        tuned.apply(path, "B")


def test_where_choices_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWBIT_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.default_path("NVIDIA H100 80GB HBM3") == tmp_path / "lowbit" / "tuned-nvidia-h100-80gb-hbm3.json"
    monkeypatch.setenv("LOWBIT_TUNED", "/x/y.json")
    assert str(tuned.default_path("any")) == "/x/y.json"


def test_candidates_are_few_and_valid():
    for bits in (1, 2, 4, 8):
        for bucket, most in enumerate(BUCKETS):
            found = list(tune.candidates(bits, bucket, most or 4096))
            assert 2 <= len(found) <= 9
            for route, entry in found:
                assert route in config.ROUTE_NAMES and entry.block_n % 16 == 0
                assert (entry.block_m <= 16) == (most is not None and most <= 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "measures on a CUDA GPU" in capsys.readouterr().err
