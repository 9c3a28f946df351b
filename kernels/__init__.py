"""GPU kernels: `linear(x, weight)` on weights that stay at 1, 2, 4 or 8 bits in GPU memory.

The CUDA C++ kernels are in csrc/cuda (`lowbit._CUDA`), the Triton ones here; one layout serves both. Importing this
package loads neither torch nor Triton; the kernels themselves are loaded by the first call.

    weight.py    the GPU layout of a quantized matrix and the pure function that makes it
    dequant.py   packed codes -> levels: the only place where the kernels differ by bit width and table
    gemv.py      1 to 16 rows of activations, split along K
    gemm.py      more rows, tensor-core tiles
    config.py    tile sizes and which kernel serves, by (bits, rows): tables, no autotuning
    launch.py    checks, picks a kernel, launches
    tuned.py     measured choices in place of the tables' defaults: `lowbit tune`
    decode.py    LayerNorm and attention of one decoding step;   logsumexp.py   a vocabulary's normaliser
    cuda.py      the host side of the CUDA kernels
    aot.py       compiles without a GPU and reads registers, spills and shared memory back
"""

from __future__ import annotations

import importlib

_EXPORTS = {"GpuWeight": "weight", "KernelConfig": "config", "linear": "launch"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"lowbit.kernels.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lowbit.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
