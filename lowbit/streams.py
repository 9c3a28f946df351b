"""Text as a stream: lines of a file, a gzip file or standard input; output that appears only when complete."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import IO

from lowbit.errors import LowbitError
from lowbit.files import PathLike, atomic_path

STDIO = "-"


@contextlib.contextmanager
def open_bytes(path: PathLike) -> Iterator[IO[bytes]]:
    """Read a file, decompressed where its name ends in ``.gz``; "-" is standard input.

    Raises:
        LowbitError: it cannot be opened, or reading it fails inside the ``with`` block.
    """
    try:
        if str(path) == STDIO:
            yield sys.stdin.buffer
            return
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LowbitError(f"{path}: cannot read: {reason}") from None


def numbered_lines(path: PathLike) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text, without its end, of every line; one that is not UTF-8 is an error that names it."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise LowbitError(f"{path}: line {number} is not UTF-8 text") from None


@contextlib.contextmanager
def text_output(path: PathLike) -> Iterator[IO[str]]:
    """Write UTF-8 text: a file appears only when complete, gzip where its name says so; "-" is standard output."""
    if str(path) == STDIO:
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as raw:
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if str(path).endswith(".gz") else raw
        with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as stream:
            yield stream
