"""How the C library hands out memory while a model trains on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # mallopt(3)
_MADV_HUGEPAGE = 14  # madvise(2)
_RESERVE = 1 << 30
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next step, in huge pages where the kernel has them. True where it could.

    glibc takes every large block fresh from the kernel and gives it back when freed (above a limit that rises to 32
    MiB at most). A training step frees and asks for the same tensors again and again, so that the kernel clears
    hundreds of megabytes of pages a step: about a sixth of its time. From here on the process keeps its peak of memory
    until :func:`release_freed_memory`; what is reserved beyond it takes addresses, not memory. That function gives the
    reserve back too: call this one again after it.

    Does nothing on other C libraries, or where the environment sets malloc's options.
    """
    if not _has_glibc() or _set_by_user():
        return False
    libc = ctypes.CDLL(None)
    # The threshold is unsigned: -1 is the largest, the heap's end is never trimmed.
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20))
    done = all(libc.mallopt(*option) for option in options)
    _reserve_huge_pages(libc)
    return done


def release_freed_memory() -> None:
    """Give the kernel back what is free now: a stage does not sit on the peak of the stage before it."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)


def _reserve_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap once, untouched, and ask for huge pages there: a kernel that refuses leaves ordinary ones."""
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = address, [size], [address]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    block = libc.malloc(_RESERVE)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, _RESERVE - _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)
