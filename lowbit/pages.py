"""Memory for weights on huge pages, from which a matrix is read faster than from 4 KiB pages.

A hardware prefetcher stops at the end of a page, and every 4 KiB cost a translation (a walk in two dimensions in a
virtual machine). Linux gives huge pages to aligned memory on request (transparent huge pages, "madvise"); where it does
not, or on another system, the memory is ordinary and nothing else changes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading

import torch

HUGE = 1 << 21  # bytes of a huge page on x86-64, and on AArch64 with 4 KiB base pages
CHUNK = 4 * HUGE  # matrices smaller than a huge page share chunks of this size
ALIGN = 64  # bytes; kAlign of csrc/layout.h

_lock = threading.Lock()
_chunk: torch.Tensor | None = None  # what is left of the current one


def _map(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], untouched memory that starts at a huge page; unmapped with its last view."""
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes)
    return whole[start : start + nbytes]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Like :func:`torch.empty`, 64-byte aligned, on huge pages where the system has them.

    Small tensors share chunks of 8 MiB, which live as long as any tensor in them.
    """
    global _chunk
    nbytes = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    if nbytes >= HUGE:
        return _map(nbytes).view(dtype).view(shape)
    room = -(-nbytes // ALIGN) * ALIGN
    with _lock:
        if _chunk is None or len(_chunk) < room:
            _chunk = _map(CHUNK)
        memory, _chunk = _chunk[:nbytes], _chunk[room:]
    return memory.view(dtype).view(shape)


def copy(t: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``t`` in memory from :func:`empty`."""
    return empty(*t.shape, dtype=t.dtype).copy_(t)
