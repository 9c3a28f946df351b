from __future__ import annotations

import json
import os

import pytest

from lowbit.container import write_packed
from lowbit.tools.show import main


@pytest.fixture
def path(tmp_path, packed_model):
    write_packed(tmp_path / "m.lowbit", packed_model)
    return tmp_path / "m.lowbit"


def test_table_names_every_matrix_and_the_totals(path, packed_model, capsys):
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    for name in packed_model.matrices:
        assert name in out
    assert f"{os.path.getsize(path):,} = matrices" in out
    assert f"{packed_model.fp32_nbytes / os.path.getsize(path):.2f} times smaller" in out
    assert "11 words" in out and '{"by": "test"}' in out


def test_json_adds_up(path, packed_model, capsys):
    assert main([str(path), "--json", "--verify"]) == 0
    result = json.loads(capsys.readouterr().out)
    parts = ("matrices_nbytes", "vectors_nbytes", "vocab_nbytes", "header_nbytes")
    assert sum(result[part] for part in parts) == result["nbytes"] == os.path.getsize(path)
    assert result["matrices_nbytes"] == sum(m.nbytes for m in packed_model.matrices.values())
    assert [m["name"] for m in result["matrices"]] == list(packed_model.matrices)
    assert result["matrices"][2] == {
        "name": "layers.0.attn.k", "shape": [36, 36], "bits": 2, "table": "midrise2", "group": None,
        "nbytes": 36 * 9 + 36 * 2, "ratio": 4 * 36 * 36 / (36 * 9 + 36 * 2),
    }  # fmt: skip
    assert result["verified_tensors"] == 1 + 2 * len(packed_model.matrices) + len(packed_model.vectors)


def test_verify_finds_damage_that_the_header_does_not_show(path, capsys):
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    assert main([str(path)]) == 0
    capsys.readouterr()
    assert main([str(path), "--verify"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("lowbit show: ") and "checksum mismatch" in captured.err


def test_provenance_cannot_control_the_terminal(tmp_path, packed_model, capsys):
    packed_model.info = {"by": "\x1b[2J\u202e [red]x[/red]"}
    write_packed(tmp_path / "m.lowbit", packed_model)
    assert main([str(tmp_path / "m.lowbit")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "[red]x[/red]" in out


def test_bad_input(tmp_path, capsys):
    (tmp_path / "text").write_text("hello, world")
    assert main([str(tmp_path / "text")]) == 2
    assert "not a packed model" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main([]) == 2
