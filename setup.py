"""Build driver: hands the extension `lowbit._C` to CMake; everything declarative is in pyproject.toml.

Never imports torch: the extension takes raw pointers, so one build serves every torch version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Path of `name`, preferring the one beside this interpreter (pip's build requirements land there)."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        sys.exit(f"lowbit: building needs {name}; install it with: {sys.executable} -m pip install {name}")
    return found


def wants_cuda() -> bool:
    """Whether to build lowbit._CUDA: LOWBIT_CUDA=on or off; auto, the default: where nvcc and an NVIDIA GPU are found.

    A machine that has nvcc alone is asked for nothing, and told so: its CPU build takes no longer.
    """
    wish = os.environ.get("LOWBIT_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        sys.exit(f"lowbit: LOWBIT_CUDA must be auto, on or off, not {wish!r}")
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wish == "on" and not compiler:
        sys.exit("lowbit: LOWBIT_CUDA=on needs nvcc: put it on PATH or set CUDACXX, or build with LOWBIT_CUDA=off")
    if wish == "auto" and compiler and not has_gpu():
        print(f"lowbit: found {compiler} but no NVIDIA GPU: not building lowbit._CUDA (LOWBIT_CUDA=on builds it)")
        return False
    return wish == "on" or (wish == "auto" and bool(compiler))


def has_gpu(devices: str = "/dev") -> bool:
    """Whether the driver shows a GPU: /dev/nvidia0 and so on (a container may have a later one only), or WSL's dxg."""
    folder = Path(devices)
    return any(folder.glob("nvidia[0-9]*")) or (folder / "dxg").exists()


class CMakeBuild(build_ext):
    """build_ext that configures and builds CMakeLists.txt and leaves the .so where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if ext.name == "lowbit._CUDA":
            return  # CMake has built it beside lowbit._C
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('LOWBIT_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLOWBIT_OUTPUT_DIR={target.parent}",
            f"-DLOWBIT_CUDA={'ON' if len(self.extensions) > 1 else 'OFF'}",
        ]  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        try:
            if archs := os.environ.get("LOWBIT_CUDA_ARCHS"):  # for instance 90-real
                configure.append(f"-DLOWBIT_CUDA_ARCHS={archs}")
            # pip's build isolation moves cmake, ninja and pybind11 at every build: forget where they were.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            subprocess.run(configure, check=True)
            subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"lowbit: building the extension failed: {' '.join(map(str, error.cmd))}")


setup(
    packages=[
        "lowbit",
        "lowbit.kernels",
        "lowbit.tools",
        "lowbit.tools.demo_parts",
        "lowbit.tools.search",
        "lowbit.tools.table_parts",
        "lowbit.tools.training",
    ],
    package_dir={"lowbit": "lowbit", "lowbit.kernels": "kernels", "lowbit.tools": "tools"},
    package_data={"lowbit.tools": ["configs/*.json", "configs/tables/*.json"]},
    ext_modules=[Extension(name, sources=[]) for name in ("lowbit._C", "lowbit._CUDA")[: 1 + wants_cuda()]],
    cmdclass={"build_ext": CMakeBuild},
)
