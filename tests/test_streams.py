from __future__ import annotations

import gzip
import io
import sys

import pytest

from lowbit.errors import LowbitError
from lowbit.streams import numbered_lines, open_bytes, text_output


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_lines_come_back(tmp_path, name):
    with text_output(tmp_path / name) as stream:
        stream.write("a\nü \n\nlast")
    assert list(numbered_lines(tmp_path / name)) == [(1, "a"), (2, "ü "), (3, ""), (4, "last")]
    assert name.endswith(".gz") == ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b")


def test_equal_texts_make_equal_gzip_files(tmp_path):
    for name in ("a.gz", "b.gz"):
        with text_output(tmp_path / name) as stream:
            stream.write("x")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_nothing_is_left_of_a_failure(tmp_path):
    (tmp_path / "old").write_text("kept")
    for name in ("old", "new.gz"):
        with pytest.raises(LowbitError, match="stop"), text_output(tmp_path / name) as stream:
            stream.write("half")
            raise LowbitError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


def test_windows_line_ends_and_bad_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"a\r\nb\xff\r\n")
    lines = numbered_lines(tmp_path / "x")
    assert next(lines) == (1, "a")
    with pytest.raises(LowbitError, match="line 2 is not UTF-8"):
        next(lines)


def test_unreadable_files(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a\n" * 9999)[:-9])
    (tmp_path / "not.gz").write_bytes(b"plain")
    for name in ("none", "cut.gz", "not.gz", "."):
        with pytest.raises(LowbitError, match="cannot read"):
            list(numbered_lines(tmp_path / name))


def test_standard_streams(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode())))
    with open_bytes("-") as stream:
        assert stream.read() == "é\n".encode()
    with text_output("-") as out:
        out.write("é\n")
    assert capsys.readouterr().out == "é\n"
