from __future__ import annotations

import gzip
import os

import pytest

from lowbit.errors import LowbitError
from lowbit.files import atomic_path, read_json, read_lines, write_json, write_text


def test_atomic_path_replaces(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_path_leaves_nothing_behind_on_failure(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_path_names_the_path(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "no" / "x", file / "x", tmp_path, tmp_path / "pipe", tmp_path / ("x" * 255)):
        with pytest.raises(LowbitError, match="cannot write"), atomic_path(bad) as temporary:
            temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_text_round_trip_and_reproducible_gzip(tmp_path):
    for name in ("a.txt", "a.txt.gz"):
        write_text(tmp_path / name, "eins\nzwei ü\n\n")
        assert read_lines(tmp_path / name) == ["eins", "zwei ü", ""]
    first = (tmp_path / "a.txt.gz").read_bytes()
    write_text(tmp_path / "a.txt.gz", "eins\nzwei ü\n\n")
    assert (tmp_path / "a.txt.gz").read_bytes() == first


def test_read_lines_refuses(tmp_path):
    with pytest.raises(LowbitError, match="No such file"):
        read_lines(tmp_path / "none")
    (tmp_path / "latin1").write_bytes(b"ok\nna\xefve\n")
    with pytest.raises(LowbitError, match=r"latin1: line 2 is not UTF-8 text$"):
        read_lines(tmp_path / "latin1")
    whole = gzip.compress(b"some text\n" * 1000)
    damaged = whole[:40] + bytes([whole[40] ^ 0xFF]) + whole[41:]
    for data in (b"not gzip", whole[:30], damaged):
        (tmp_path / "bad.gz").write_bytes(data)
        with pytest.raises(LowbitError, match=r"bad\.gz"):
            read_lines(tmp_path / "bad.gz")
        with pytest.raises(LowbitError, match=r"bad\.gz"):
            read_json(tmp_path / "bad.gz")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", float("nan"))
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ("", "not JSON"), ("[" * 100_000, "nested"), ('{"a":1,"a":2}', "'a' is given twice")],
)
def test_read_json_refuses(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(LowbitError, match=reason):
        read_json(tmp_path / "a.json")
