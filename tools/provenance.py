"""What a packed file says of its making, padded so that the size of the file depends on its plan alone.

Perplexities, seconds and names have as many digits as they happen to have. Padded to whole blocks they take the same
bytes in nearly every file, so that `lowbit allocate` can promise a file's size to the byte before the model is trained.
"""

from __future__ import annotations

import json
from typing import Any

PROVENANCE_BYTES = 2048
_KEY = "pad"


def stored_nbytes(info: dict[str, Any]) -> int:
    """Bytes of ``info`` in a packed file: JSON text, escaped once more as the text of the header's metadata."""
    return len(json.dumps(json.dumps(info, separators=(",", ":"), allow_nan=False))) - 2


def padded(info: dict[str, Any]) -> dict[str, Any]:
    """``info`` with spaces under "pad", so that it fills a multiple of ``PROVENANCE_BYTES``."""
    info = {k: v for k, v in info.items() if k != _KEY}
    empty = stored_nbytes(info | {_KEY: ""})
    return info | {_KEY: " " * (-empty % PROVENANCE_BYTES)}


def unpadded(info: dict[str, Any]) -> dict[str, Any]:
    """``info`` as people want to read it."""
    return {k: v for k, v in info.items() if k != _KEY}
