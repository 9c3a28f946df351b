"""tools/training/start.py: what every training checks before it starts."""

from __future__ import annotations

import os

import pytest
from tiny_training import train_argv, write_data

from lowbit.tools import train


def refused(argv: list[str], capsys, reason: str) -> None:
    """Exit code 2 and one line, nothing else said or written."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and reason in captured.err, captured.err


def test_outputs_are_checked_before_the_work(tmp_path, capsys):
    argv = train_argv(tmp_path)
    before = set(os.listdir(tmp_path))
    refused([*argv, "--out", str(tmp_path)], capsys, "exists and is not a regular file")
    refused([*argv, "--out", str(tmp_path / "no" / "x.safetensors")], capsys, "does not exist")
    refused([*argv, "--threads", "0"], capsys, "--threads must be at least 1, not 0")
    refused([*argv, "--threads", "-2"], capsys, "--threads must be at least 1, not -2")
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_text_that_is_too_short_is_named(tmp_path, capsys, split):
    data = write_data(tmp_path)
    (data / f"{split}.txt").write_text("w1 w2\n")
    refused(train_argv(tmp_path, mode="stream"), capsys, f"{data / split}.txt: the text has 4 tokens")


@pytest.mark.parametrize("mode", ["stream", "sentence"])
def test_unknown_words_are_counted_and_reported(tmp_path, capsys, mode):
    data = write_data(tmp_path)
    with open(data / "valid.txt", "a") as stream:
        stream.write("w1 never heard w2\n")
    words = len((data / "valid.txt").read_text().split())
    assert train.main(train_argv(tmp_path, mode=mode, epochs=0.1)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert lines == [f"{data / 'valid.txt'}: 2 of {words:,} words ({2 / words:.2%}) unknown, read as <unk>"]
