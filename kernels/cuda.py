"""The host side of the CUDA kernels: `lowbit._CUDA` behind checked arguments.

The module is built where nvcc is (LOWBIT_CUDA=auto|on|off); :func:`module` says whether it is here. Kernels run on the
current stream of the tensors' device, whichever device is the current one. Workspaces come from torch's allocator. The
counters by which blocks find out who arrives last belong to a stream or to one recording of a graph, which clears them
whenever it is replayed; every launch leaves them at zero.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from lowbit.errors import LowbitError
from lowbit.kernels.config import NATIVE_TILES, native_blocks, native_splits
from lowbit.kernels.weight import CHUNK, ROW_PAD, GpuWeight

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}
_COUNTERS = 16384
_PANEL_BYTES = 32 * 2**20  # of dense weights that exist at a time: they stay in the L2 cache of a large GPU
# (device, stream, whether in a graph) -> (number of the recording, counters). A graph may be replayed on any stream, at
# the same time as others: it has its own.
_counters: dict[tuple[int, int, bool], tuple[int, torch.Tensor]] = {}


@functools.cache
def module() -> ModuleType | None:
    """`lowbit._CUDA`, or None where it was not built.

    Raises:
        LowbitError: it was built, and cannot be loaded.
    """
    if importlib.util.find_spec("lowbit._CUDA") is None:
        return None
    try:
        from lowbit import _CUDA
    except ImportError as error:
        raise LowbitError(
            f"the CUDA extension cannot be loaded ({error}): build it again, LOWBIT_CUDA=off without"
        ) from None
    return _CUDA


def view(weight: GpuWeight):
    """The extension's view of a weight, made once and kept with it."""
    if weight.native is None:
        n, k = weight.shape
        levels = weight.levels if weight.bits < 8 else []
        weight.native = module().Weight(
            weight.codes.data_ptr(), weight.scales.data_ptr(), levels, n, k, weight.bits, weight.group,
            weight.affine is None,
        )  # fmt: skip
    return weight.native


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as the kernels read it: rows 16-byte aligned, zeros from K to a multiple of 8; copied if not so."""
    k = x.shape[1]
    if k % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -k % 8)) if k % 8 else x.contiguous().clone()


def linear(
    x: torch.Tensor,
    weight: GpuWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    splits: int | None = None,
    tile_m: int | None = None,
    early: bool = True,
    wgmma: bool = False,
) -> None:
    """y [M, N] = residual + activation(x W^T + bias), enqueued.

    Args:
        x: fp16/bf16 [M, >= K] as :func:`whole_rows` makes them.
        bias: fp32 [N] or None.
        y: of x's dtype or fp32, outputs adjacent; may be ``residual``, which has y's dtype and strides.
        splits, tile_m: instead of the table's (measurements, tests).
        wgmma: by warp-group products, for which x is laid anew first (csrc/cuda/qwgmma.cuh); where has_wgmma() says so.
        early: from sm_90 on, start while the kernel before in the stream ends (programmatic dependent launch).
    """
    m = x.shape[0]
    if wgmma or tile_m is None:
        tile_m = next((rows for rows in NATIVE_TILES if m <= rows and not wgmma), NATIVE_TILES[-1])
    blocks = native_blocks(weight.bits, tile_m, m, weight.padded_rows)
    if splits is None:
        most = native_splits(weight.bits, tile_m, m, weight.padded_rows, weight.shape[1], processors(x.device))
        splits = most if blocks <= _COUNTERS else 1
    if splits > 1 and blocks > _COUNTERS:
        raise LowbitError(f"{blocks} tiles cannot be split along K: {_COUNTERS} counters")
    partial = arrived = packed = None
    queue = _queue(x.device)
    if wgmma:
        chunks = -(-weight.shape[1] // CHUNK)
        packed = torch.empty((-(-m // tile_m), chunks, tile_m, CHUNK), dtype=x.dtype, device=x.device)
    if splits > 1:
        partial = torch.empty((splits, m, weight.padded_rows), dtype=torch.float32, device=x.device)
        arrived = _arrived(x.device, *queue)
    module().linear(
        view(weight), x.data_ptr(), x.stride(0), m, x.dtype == torch.bfloat16, _address(bias), _address(residual),
        ACTIVATIONS[activation], y.data_ptr(), y.stride(0), y.dtype == torch.float32, early, tile_m,
        splits, _address(partial), _address(arrived), _address(packed), *queue,
    )  # fmt: skip


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether the route "wgmma" exists: sm_90 (H100, H200), of an extension that was compiled for 90a."""
    return module().has_wgmma(device.index if device.index is not None else torch.cuda.current_device())


def dense(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y [M, N] = x W^T + bias by dense panels of W, rounded to x's dtype, and the library's matrix product.

    What it takes beside the packed weight is one panel. Worth it where M is so large that unpacking is nothing.
    """
    n, k = weight.shape
    pitch = -(-k // CHUNK) * CHUNK
    rows = max(ROW_PAD, _PANEL_BYTES // (2 * pitch) // ROW_PAD * ROW_PAD)
    panel = torch.empty((min(rows, weight.padded_rows), pitch), dtype=x.dtype, device=x.device)
    queue = _queue(x.device)
    for first in range(0, n, len(panel)):
        count = min(len(panel), weight.padded_rows - first)
        module().panel(view(weight), x.dtype == torch.bfloat16, first, count, panel.data_ptr(), *queue)
        last = min(first + count, n)
        columns, wide = y[:, first:last], panel[: last - first, :k].t()
        if y.dtype == x.dtype:
            torch.mm(x, wide, out=columns)
        else:  # sums are not rounded to 16 bits on the way
            columns.copy_(torch.mm(x, wide, out_dtype=torch.float32))
        if bias is not None:
            columns += bias[first:last]


def rows(weight: GpuWeight, ids: torch.Tensor) -> torch.Tensor:
    """fp32 [count, K]: rows ``ids`` (int64 [count], inside W) of the dequantized matrix."""
    out = torch.empty((len(ids), weight.shape[1]), dtype=torch.float32, device=ids.device)
    if len(ids):
        module().rows(view(weight), ids.data_ptr(), len(ids), out.data_ptr(), *_queue(ids.device))
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _queue(device: torch.device) -> tuple[int, int]:
    """Number of a device and address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _arrived(device: torch.device, number: int, stream: int) -> torch.Tensor:
    """int32 [_COUNTERS], zero when the next kernel of this stream starts, or of the graph that records it."""
    recording = module().recording(number, stream)
    key = (number, stream, recording > 0)
    if key not in _counters or _counters[key][0] != recording:
        _counters[key] = recording, torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key][1]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
