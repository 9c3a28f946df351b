"""Files: atomic writes and reads whose errors name the path."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lowbit.errors import LowbitError

PathLike = str | os.PathLike[str]


def check_writable(path: PathLike) -> None:
    """Raises LowbitError unless a file can be written at ``path``: before long work, where it costs nothing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise LowbitError(f"{path}: cannot write: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        # Renaming onto /dev/null or a pipe would replace the device itself.
        raise LowbitError(f"{path}: cannot write: exists and is not a regular file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise LowbitError(f"{path}: cannot write: the folder {path.parent} is read-only")


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; fsync and rename it to ``path`` on success, remove it on failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        check_writable(path)
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LowbitError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path: PathLike, wait: bool = True, busy: type[Exception] = BlockingIOError) -> Iterator[None]:
    """Of several processes that work on ``path``, one at a time; a process that ends lets go by itself.

    Args:
        path: what is worked on; the lock is the file ``PATH.lock``, whose folder is made.
        wait: for the other to end; otherwise ``busy`` is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise busy(f"{path}: another process works on it") from None
        yield


def write_text(path: PathLike, text: str) -> None:
    """Atomic replacement of a text file; gzip where the name ends in ``.gz``."""
    with atomic_path(path) as temporary:
        data = text.encode()
        temporary.write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def write_json(path: PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def open_text(path: PathLike) -> IO[str]:
    """Open a UTF-8 text file, gzip-compressed or not, for reading."""
    try:
        if str(path).endswith(".gz"):
            return gzip.open(path, "rt", encoding="utf-8")
        return open(path, encoding="utf-8")
    except OSError as error:
        raise LowbitError(f"{path}: cannot read: {error.strerror or error}") from None


def not_utf8(path: PathLike) -> LowbitError:
    """The error for a text that does not decode. Reads it again: decoding in blocks does not tell the line."""
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return LowbitError(f"{path}: line {number} is not UTF-8 text")
    return LowbitError(f"{path}: not UTF-8 text")


def read_lines(path: PathLike) -> list[str]:
    """Lines of a text file without their ends; undecodable bytes are an error that names the line."""
    with open_text(path) as stream:
        lines: list[str] = []
        try:
            lines.extend(line.rstrip("\n") for line in stream)
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except (OSError, EOFError, zlib.error) as error:
            raise LowbitError(f"{path}: cannot read: {error}") from None
    return lines


def read_json(path: PathLike) -> Any:
    """A JSON file; a key given twice is an error, since only one of its values could count."""
    try:
        with open_text(path) as stream:
            return json.load(stream, object_pairs_hook=_unique_keys)
    except LowbitError:
        raise
    except RecursionError:
        raise LowbitError(f"{path}: not JSON: nested too deeply") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise LowbitError(f"{path}: not JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return result
