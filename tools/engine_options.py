"""How a model runs: the options of every stage that loads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.engine import LanguageModel


def add_model(p: argparse.ArgumentParser) -> None:
    """The positional MODEL."""
    p.add_argument("model", metavar="MODEL", help="checkpoint (.safetensors) or packed model (.lowbit)")


def add_engine_options(p: argparse.ArgumentParser) -> None:
    """Device, arithmetic and threads."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--compute", choices=("int8", "exact"), default="int8", help="activations of a packed model")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")


def load_engine(args: argparse.Namespace) -> LanguageModel:
    """The language model that the arguments ask for."""
    import lowbit

    return lowbit.load(args.model, device=args.device, compute=args.compute, threads=args.threads)
