"""What `make` runs first: a virtual environment with the pinned packages and the compiled extension.

Uses the standard library only, and runs far enough on an old Python to say that it is too old. A second call compares
two hashes and is done.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
BUILD_TOOLS = ("pip>=23.1", "setuptools>=77", "pybind11", "cmake", "ninja")
EXTRAS = "dev,plot"
NO_DEPENDENCIES = ("--no-deps", "pyctcdecode", "pygtrie")
FAILURE_LINES = 60
PACKAGE_SOURCES = ("pyproject.toml", "constraints.txt")
EXTENSION_SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "csrc")
VERSION = sys.version.split()[0]
PROGRAM = """#include <omp.h>
#include <optional>
int main() { return std::optional<int>(omp_get_max_threads()).value() < 1; }
"""


def missing():
    """What this machine lacks: (what, Debian's package, Fedora's package) of each."""
    found = []
    dotted = (
        f"python{sys.version_info[0]}.{sys.version_info[1]}" if sys.executable.startswith("/usr/bin/") else "python3"
    )
    if sys.version_info < OLDEST:
        wanted = f"Python {OLDEST[0]}.{OLDEST[1]} or newer ({sys.executable} is {VERSION})"
        return [(wanted, "python3 python3-venv python3-dev", "python3-devel")]
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        found.append(("the Python modules venv and ensurepip", dotted + "-venv", "python3"))
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        found.append(("Python.h, the headers of " + sys.executable, dotted + "-dev", "python3-devel"))
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    reason = compiler and compile_error(compiler)
    if compiler is None:
        found.append(("a C++17 compiler", "g++", "gcc-c++"))
    elif reason:
        found.append((f"a C++17 compiler with OpenMP ({compiler}: {reason})", "g++", "gcc-c++"))
    return found


def compile_error(compiler):
    """Why ``compiler`` cannot build a small C++17 program with OpenMP, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "try.cpp")
        with open(source, "w") as stream:
            stream.write(PROGRAM)
        command = [*shlex.split(compiler), "-std=c++17", "-fopenmp", source, "-o", os.path.join(folder, "try")]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return error.strerror
        return (done.stderr.strip().splitlines() or ["fails"])[0] if done.returncode else None


def digest(paths, *more):
    """Hash of the bytes of files and folders under ROOT, and of ``more`` strings."""
    state = hashlib.sha256("\0".join(more).encode())
    for path in paths:
        full = os.path.join(ROOT, path)
        files = [full]
        if os.path.isdir(full):
            files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(full) for name in names)
        for name in files:
            with open(name, "rb") as stream:
                state.update(name[len(ROOT) :].encode() + stream.read())
    return state.hexdigest()


def step(text, *command):
    """Say what happens, run it quietly, and stop with the end of its output where it fails."""
    print("setup: " + text, flush=True)
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stdout.write("".join(done.stdout.decode(errors="replace").splitlines(True)[-FAILURE_LINES:]))
        stop("failed: " + " ".join(command))
    if time.time() - started > 5:
        print(f"setup:   done in {time.time() - started:.0f} s", flush=True)


def stop(reason):
    sys.exit("setup: " + reason)


class Stamp:
    """A file in the environment that holds the hash of what it was made from."""

    def __init__(self, venv, name, value):
        self.path, self.value = os.path.join(venv, "lowbit-" + name), value

    def fresh(self):
        if not os.path.isfile(self.path):
            return False
        with open(self.path) as stream:
            return stream.read() == self.value

    def write(self):
        with open(self.path, "w") as stream:
            stream.write(self.value)


def version_of(venv):
    """'3.11.7' of an existing environment."""
    with open(os.path.join(venv, "pyvenv.cfg")) as stream:
        fields = dict(line.split(" = ", 1) for line in stream.read().splitlines() if " = " in line)
    return fields.get("version", "unknown")


def stop_lacking(lacking):
    """Name what is missing and the commands that install it."""
    lines = [f"this machine lacks {what}" for what, _, _ in lacking]
    for manager, column in (("apt", 1), ("dnf", 2)):
        packages = " ".join(dict.fromkeys(" ".join(row[column] for row in lacking).split()))
        lines.append(f"install with: sudo {manager} install {packages}")
    stop("\nsetup: ".join(lines))


def prepare(venv, chosen):
    """Make the environment, or make it anew where another interpreter was asked for."""
    python = os.path.join(venv, "bin", "python")
    place = Stamp(venv, "place", venv)
    if os.path.exists(python) and chosen and version_of(venv) != VERSION:
        print(f"setup: {venv} has Python {version_of(venv)}, not {VERSION}: making it anew", flush=True)
        shutil.rmtree(venv)
    elif os.path.isfile(place.path) and not place.fresh():
        print(f"setup: {venv} was made in another folder, where its commands still point: making it anew", flush=True)
        shutil.rmtree(venv)
    if os.path.exists(python) and subprocess.call([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0:
        return python
    lacking = missing()
    if lacking:
        stop_lacking(lacking)
    step(f"virtual environment {venv}, Python {VERSION}", sys.executable, "-m", "venv", "--clear", venv)
    place.write()
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--chosen", action="store_true", help="this interpreter was asked for: another one will not do")
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        print("setup: another interpreter is chosen with: PYTHON=python3.12 make", file=sys.stderr)
        stop_lacking(missing())
    venv = os.path.join(ROOT, args.venv)
    python = prepare(venv, args.chosen)
    packages = Stamp(venv, "packages", digest(PACKAGE_SOURCES, EXTRAS, *NO_DEPENDENCIES))
    extension = Stamp(venv, "extension", digest(EXTENSION_SOURCES, *os.environ.get("CXX", "").split()))
    more = ["--disable-pip-version-check", "--progress-bar=off", *shlex.split(os.environ.get("PIP_ARGS", ""))]
    pip = [python, "-m", "pip", "install", *more, "-c", "constraints.txt"]
    if not packages.fresh():
        step("build tools: setuptools, pybind11, cmake, ninja", *pip, *BUILD_TOOLS)
        step("packages of constraints.txt (PyTorch is the large one), extension compiled with CMake",
             *pip, "--no-build-isolation", "-e", f".[{EXTRAS}]")  # fmt: skip
        step("pyctcdecode for the tests: it asks for an older numpy, and runs with this one", *pip, *NO_DEPENDENCIES)
        packages.write()
        extension.write()
    elif not extension.fresh() or not any(n.startswith("_C.") for n in os.listdir(os.path.join(ROOT, "lowbit"))):
        step("extension, compiled with CMake", *pip, "--no-deps", "--no-build-isolation", "-e", ".")
        extension.write()


if __name__ == "__main__":
    main()
