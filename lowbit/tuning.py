"""Crossovers measured on this machine: where the CPU kernel for few rows hands over to the one for many.

The extension has defaults (csrc/cpu/crossover.h). `lowbit tune-cpu` measures better ones and keeps them in one file a
CPU model and version of lowbit, in the user's cache folder; every process reads it once, before its first product.
The environment variable LOWBIT_TUNING=FILE names another file, which must exist, and LOWBIT_TUNING=off reads none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import read_json, write_json

VERSION = 1
VARIABLE = "LOWBIT_TUNING"
ISAS = ("scalar", "neon", "avx2", "avx512", "amx")
BITS = (1, 2, 4, 8)
MAX_ROWS = 1 << 20

Crossovers = dict[str, dict[int, int]]  # [isa][bits]: rows from which the kernel for many rows runs


def processor() -> str:
    """The name of this CPU model, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")
    fields = dict(reversed([(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]))
    return " ".join(fields[name] for name in wanted if fields.get(name)) or platform.processor() or platform.machine()


def default_path() -> Path:
    """The file of this CPU model and this version of lowbit in the user's cache folder."""
    from lowbit import __version__

    name = processor()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
    digest = hashlib.sha256(f"{name}\0{__version__}".encode()).hexdigest()[:8]
    return cache_folder() / f"crossovers-{readable}-{digest}.json"


def cache_folder() -> Path:
    """lowbit's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def chosen_path(variable: str = VARIABLE) -> Path | None:
    """The file that the environment variable names, if it names one."""
    chosen = os.environ.get(variable, "")
    return Path(chosen) if chosen not in ("", "off") else None


def read(path: str | os.PathLike[str]) -> Crossovers:
    """The crossovers of a file.

    Raises:
        LowbitError: the file cannot be read or holds something else; names it, and says what to do.
    """
    value = read_json(path)
    table = value.get("crossovers") if isinstance(value, dict) and value.get("version") == VERSION else None
    if not isinstance(table, dict) or not all(_valid(isa, rows) for isa, rows in table.items()):
        raise LowbitError(f"{path}: not a file of lowbit tune-cpu; delete it and measure again")
    return {isa: {int(bits): count for bits, count in rows.items()} for isa, rows in table.items()}


def _valid(isa: str, rows: Any) -> bool:
    return (
        isa in ISAS
        and isinstance(rows, dict)
        and all(bits in map(str, BITS) and type(n) is int and 1 <= n <= MAX_ROWS for bits, n in rows.items())
    )


def write(path: str | os.PathLike[str], crossovers: Crossovers, threads: int) -> None:
    """Replace the file in one step, so that a reader sees the old or the new one. Makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table = {isa: {str(bits): n for bits, n in rows.items()} for isa, rows in crossovers.items()}
    write_json(path, {"version": VERSION, "processor": processor(), "threads": threads, "crossovers": table})


_applied = False


def apply_once(native: Any) -> None:
    """Hand the file's crossovers to the extension ``native`` at the first call, if there is a file.

    Raises:
        LowbitError: LOWBIT_TUNING names a file that does not exist, or the file is damaged.
    """
    global _applied
    if _applied:
        return
    if os.environ.get(VARIABLE) != "off":
        named = chosen_path()
        path = named or default_path()
        if named or path.exists():
            try:
                apply(native, read(path))
            except LowbitError as error:
                raise LowbitError(f"{error} ({VARIABLE}=off ignores it)") from None
    _applied = True


def apply(native: Any, crossovers: Crossovers) -> None:
    """Set the crossovers of the instruction sets that this machine has."""
    for isa in native.available_isas():
        for bits, rows in crossovers.get(isa, {}).items():
            native.set_crossover(isa, bits, rows)
