"""Low-bit Transformer language models: quantize, pack, score, generate and rescore at 1/2/4/8 bits.

Names are loaded on first use (PEP 562): `import lowbit` alone imports neither torch nor a GPU library.
"""

from __future__ import annotations

import importlib
import sys
import types

_EXPORTS = {
    "FormatError": "errors",
    "LanguageModel": "engine",
    "LowbitError": "errors",
    "ModelConfig": "config",
    "NBest": "nbest",
    "PackedWeight": "ops",
    "Plan": "plan",
    "QuantEmbedding": "layers",
    "QuantLinear": "layers",
    "QuantTensor": "quantize",
    "TransformerLM": "model",
    "Vocab": "vocab",
    "get_threads": "ops",
    "isa": "ops",
    "linear": "ops",
    "load": "engine",
    "quantize": "quantize",
    "read_nbest": "nbest",
    "set_threads": "ops",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"lowbit.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lowbit")
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


class _Package(types.ModuleType):
    """Keeps `lowbit.quantize` the function: importing the module of the same name would rebind it."""

    def __setattr__(self, name: str, value) -> None:
        if name in _EXPORTS and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
