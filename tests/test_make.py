"""The set-up behind `make`: what a machine lacks is named, pins agree with the package, nothing is done twice."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lowbit.tools import bootstrap

ROOT = Path(__file__).resolve().parents[1]


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(["make", *args], cwd=ROOT, env=clean | env, capture_output=True, text=True)


def test_help_lists_the_targets():
    out = make("help").stdout
    for target in ("setup", "demo", "test", "bench", "lint", "format", "clean"):
        assert re.search(rf"^  make {target} +\w", out, re.M), target


def test_a_missing_interpreter_is_named_with_its_installation():
    done = make("setup", PYTHON="python-that-is-not-there")
    assert done.returncode != 0
    assert "python-that-is-not-there is missing" in done.stderr and "apt install" in done.stderr


def test_what_is_missing_is_named_for_both_distributions(monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
    monkeypatch.setattr(bootstrap.sysconfig, "get_paths", lambda: {"include": "/no/such/folder"})
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit) as stop:
        bootstrap.stop_lacking(bootstrap.missing())
    text = str(stop.value)
    for what in ("a C++17 compiler", "Python.h", "ensurepip"):
        assert f"lacks {what}" in text or f"lacks the Python modules venv and {what}" in text
    assert re.search(r"sudo apt install .*-venv .*-dev g\+\+", text)
    assert re.search(r"sudo dnf install .*gcc-c\+\+", text)


def test_this_machine_lacks_nothing():
    assert bootstrap.missing() == []


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    ((what, debian, fedora),) = bootstrap.missing()
    assert "C++17 compiler with OpenMP (false" in what and (debian, fedora) == ("g++", "gcc-c++")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "No such file" in bootstrap.missing()[0][0]


def test_an_old_python_says_so(monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 1))
    ((what, _, _),) = bootstrap.missing()
    assert "Python 3.10 or newer" in what


def test_a_step_is_quiet_unless_it_fails(capfd):
    bootstrap.step("a good step", sys.executable, "-c", "print('chatter')")
    assert capfd.readouterr().out == "setup: a good step\n"
    with pytest.raises(SystemExit, match="failed: "):
        bootstrap.step("a bad step", sys.executable, "-c", "print('the reason'); raise SystemExit(3)")
    assert "the reason" in capfd.readouterr().out


def test_digest_follows_bytes_not_dates(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROOT", str(tmp_path))
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cpp"
    source.write_text("int a;")
    first = bootstrap.digest(["csrc"])
    os.utime(source, (1, 1))
    assert bootstrap.digest(["csrc"]) == first
    source.write_text("int b;")
    assert bootstrap.digest(["csrc"]) != first != bootstrap.digest(["csrc"], "more")


def test_stamp(tmp_path):
    stamp = bootstrap.Stamp(str(tmp_path), "packages", "one")
    assert not stamp.fresh()
    stamp.write()
    assert stamp.fresh() and not bootstrap.Stamp(str(tmp_path), "packages", "two").fresh()


@pytest.fixture
def environment(tmp_path, monkeypatch) -> tuple[Path, list[str]]:
    """An environment with Python 3.11.7, and what would be run to make another."""
    venv, commands = tmp_path / ".venv", []
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text("#!/bin/sh\n")  # answers `-m pip --version`
    python.chmod(0o755)
    (venv / "pyvenv.cfg").write_text("home = /usr\nversion = 3.11.7\n")

    def step(_text, *command):
        commands.append(" ".join(command[1:]))
        venv.mkdir(exist_ok=True)

    monkeypatch.setattr(bootstrap, "step", step)
    monkeypatch.setattr(bootstrap, "missing", lambda: [])
    return venv, commands


def test_an_environment_is_kept(environment):
    venv, commands = environment
    assert bootstrap.prepare(str(venv), False) == str(venv / "bin" / "python") and not commands


def test_an_environment_of_another_python_is_made_anew_where_one_was_chosen(environment, monkeypatch):
    venv, commands = environment
    monkeypatch.setattr(bootstrap, "VERSION", "3.12.1")
    bootstrap.prepare(str(venv), False)
    assert not commands
    bootstrap.prepare(str(venv), True)
    assert commands == [f"-m venv --clear {venv}"]


def test_a_moved_environment_is_made_anew(environment):
    venv, commands = environment
    (venv / "lowbit-place").write_text("/another/folder/.venv")
    bootstrap.prepare(str(venv), False)
    assert commands == [f"-m venv --clear {venv}"]
    assert (venv / "lowbit-place").read_text() == str(venv)


def pins(python: str) -> dict[str, str]:
    """Name -> version of constraints.txt for one Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                (only,) = requirement.specifier
                assert only.operator == "==" and requirement.name.lower() not in found, line
                found[requirement.name.lower()] = only.version
    return found


def requirements() -> list[Requirement]:
    """Every requirement of pyproject.toml (read as text: tomllib is newer than the oldest Python)."""
    text = (ROOT / "pyproject.toml").read_text()
    quoted = re.findall(r'"([A-Za-z][\w.-]*(?:[<>=!~][^"]*))"', text)
    return [Requirement(q) for q in quoted if not q.startswith(("lowbit", "error"))]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_pins_agree_with_the_package(python):
    pinned = pins(python)
    assert pinned["torch"] == "2.13.0"
    ours = {r.name.lower(): r for r in requirements()}
    assert {"torch", "numpy", "safetensors", "pybind11", "pytest", "ruff"} <= set(ours)
    for name, requirement in ours.items():
        if name in pinned:
            assert requirement.specifier.contains(Version(pinned[name])), f"{requirement}: pinned {pinned[name]}"
        else:
            assert name in ("onnxruntime", "onnx", "triton"), f"{name} has no tested version in constraints.txt"


def test_hooks_use_the_pinned_tools():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    for name, version in re.findall(r"\[(ruff|clang-format)==([\d.]+)\]", text):
        assert pins("3.11")[name] == version


def test_ci_is_strict_and_runs_lint_and_test():
    path = ROOT / ".ci" / "run"
    text = path.read_text()
    assert path.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in text
    assert [line for line in text.splitlines() if line.startswith("make")] == [
        "make lint </dev/null",
        "make test </dev/null",
    ]
