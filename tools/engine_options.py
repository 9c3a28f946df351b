"""How a model runs, and in which form N-best lists come: options that several stages share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.engine import LanguageModel
    from lowbit.nbest_record import NBest


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


def add_list_options(p: argparse.ArgumentParser) -> None:
    """The form of N-best lists, and how many paths of a lattice become one."""
    p.add_argument("--format", metavar="F", help="jsonl, json (mlm-scoring, ESPnet), kaldi, espnet (directory), tsv or "
                   "lattice (default: by name; a directory is Kaldi's or ESPnet2's)")  # fmt: skip
    p.add_argument("--refs", metavar="TEXT", help="references, one line an utterance: its id and its words; same order")
    p.add_argument("--paths", type=int, default=100, metavar="N", help="best paths of a lattice (default 100)")
    p.add_argument("--acoustic-scale", type=float, default=0.1, metavar="S",
                   help="of a lattice's acoustic costs, where its best paths are found (default 0.1)")  # fmt: skip
    p.add_argument("--words", metavar="words.txt", help="symbol table of lists and lattices whose words are numbers")


def read_lists(args: argparse.Namespace, path: str) -> Iterator[NBest]:
    """The lists of ``path`` as the options of :func:`add_list_options` say."""
    from functools import partial

    from lowbit.lattice import read_lattices
    from lowbit.nbest import checked, read_nbest
    from lowbit.nbest_tables import with_references, with_symbols

    if args.format == "lattice":
        reader = partial(read_lattices, paths=args.paths, acoustic_scale=args.acoustic_scale)
        lists = checked(reader, path)
    else:
        lists = read_nbest(path, args.format)
    lists = with_symbols(lists, args.words) if args.words else lists
    return with_references(lists, args.refs) if args.refs else lists
