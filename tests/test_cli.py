"""The console command: lazy dispatch, exit codes, one help text, JSON, progress."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.errors import FormatError, LowbitError
from lowbit.tools import cli

ROOT = Path(__file__).resolve().parents[1]


def run_body(body, *argv: str) -> int:
    return cli.run(cli.parser("show", "lowbit show x"), body, list(argv))


def raiser(error: BaseException):
    def body(args):
        raise error

    return body


def test_help_lists_the_stages_that_are_there(capsys):
    assert cli.entry(["--help"]) == 0
    out = capsys.readouterr().out
    for stage, text in cli.STAGES.items():
        assert (f"  {cli.command_name(stage):13}  {text}" in out) == (ROOT / "tools" / f"{stage}.py").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom lowbit.tools.cli import entry\nassert entry(['--help']) == 0\n"
        "print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_no_stage_and_unknown_stage(capsys):
    assert cli.entry([]) == 2
    assert cli.entry(["compress"]) == 2
    assert "unknown stage 'compress'" in capsys.readouterr().err
    assert cli.entry(["cli"]) == 2  # a module of tools that is no stage


def test_version(capsys):
    assert cli.entry(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lowbit 0.")


def test_entry_runs_the_stage(tmp_path, capsys):
    assert cli.entry(["show", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("lowbit show: ")


@pytest.mark.parametrize("stage", ["pack", "show"])
def test_command_and_script_print_the_same_help(stage, capsys, monkeypatch):
    assert cli.entry([stage, "--help"]) == 0
    command = capsys.readouterr().out
    script = str(ROOT / "tools" / f"{stage}.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out == command
    assert command.startswith(f"usage: lowbit {stage} ")
    assert "\nexample:\n  lowbit " in command and "--json" in command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (LowbitError("x.json: bad\nthing"), 2, "lowbit show: x.json: bad thing\n"),
        (FormatError("m: tensor 'a': bad"), 2, "lowbit show: m: tensor 'a': bad\n"),
        (FileNotFoundError(2, "No such file", "/x/y"), 2, "lowbit show: /x/y: No such file\n"),
        (KeyboardInterrupt(), 130, "lowbit show: interrupted\n"),
    ],
)
def test_exit_codes(capsys, error, code, message):
    assert run_body(raiser(error)) == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    for error in (ZeroDivisionError(), ValueError("x"), OSError("no file name")):
        with pytest.raises(type(error)):
            run_body(raiser(error))


def test_bad_arguments_return_2(capsys):
    assert run_body(lambda args: None, "--bogus") == 2
    assert run_body(lambda args: None, "--help") == 0


def test_a_closed_pipe_is_quiet():
    code = (
        "import sys\nfrom lowbit.tools import cli\n"
        "def body(args):\n    for i in range(100_000): print('line', i)\n"
        "sys.exit(cli.run(cli.parser('show', 'x'), body, []))"
    )
    child = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141
    child.stderr.close()


def test_json_goes_to_stdout_and_text_to_stderr(capsys):
    def body(args):
        cli.console(args).print("for people")
        return {"ppl": math.inf, "list": (1, math.nan), "n": 3}

    assert run_body(body, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ppl": None, "list": [1, None], "n": 3}
    assert captured.err == "for people\n"
    assert run_body(body) == 0
    assert capsys.readouterr().out == "for people\n"


def test_console_writes_to_files_without_folding(capsys):
    cli.console(argparse.Namespace(json=False)).print("x" * 100)
    assert capsys.readouterr().out == "x" * 100 + "\n"


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (5e9, "5 GB"), (1.5e12, "1,500 GB")],
)
def test_format_bytes(n, text):
    assert cli.format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (7.31, "7.3 s"), (59.99, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_format_seconds(seconds, text):
    assert cli.format_seconds(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    return now


def test_progress_is_silent_for_short_work(clock, capsys):
    for _ in cli.track(range(100), "pack"):
        clock[0] += 0.019
    assert capsys.readouterr().err == ""


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(clock, capsys):
    with cli.Progress("train", total=40, unit="step") as bar:
        for i in range(40):
            clock[0] += 1.0
            bar.advance(note=f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "train: step 10/40 (25%), 10.0 s, 30.0 s left, loss 9"


def test_resumed_progress_estimates_from_its_own_speed(clock, capsys):
    with cli.Progress("train", total=100, unit="step", done=80) as bar:
        clock[0] += 20.0
        bar.advance(10)
    assert capsys.readouterr().err == "train: step 90/100 (90%), 20.0 s, 20.0 s left\n"


def test_progress_of_unknown_length(clock, capsys):
    with cli.Progress("read", unit="lines") as bar:
        clock[0] += 11
        bar.advance(5)
    assert capsys.readouterr().err == "read: lines 5, 11.0 s\n"


def test_progress_bar_on_a_terminal(clock, monkeypatch, capsys):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    with cli.Progress("train", total=4) as bar:
        clock[0] += 3
        bar.advance(note="x")
        assert bar._bar is not None
    capsys.readouterr()
