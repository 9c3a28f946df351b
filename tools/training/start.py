"""How every training stage starts: its options, device, precision, processes, and the corpora."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

import torch

from lowbit.errors import LowbitError
from lowbit.files import PathLike, check_writable
from lowbit.tools.training.allocator import keep_freed_memory, release_freed_memory
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.data import Batches, Sentences, TokenStream, corpus_file, has_unk, read_corpus
from lowbit.tools.training.loop import has_fast_bf16, pick_device
from lowbit.tools.training.native import has_bf16_tiles
from lowbit.tools.training.parallel import Parallel
from lowbit.vocab import Vocab


@dataclass
class Corpora:
    """Training and validation text as batches, and the vocabulary that encodes them."""

    vocab: Vocab
    train: Batches
    valid: Batches

    @property
    def digest(self) -> str:
        """Hash of both texts as the vocabulary encodes them, and of the vocabulary."""
        return f"{self.vocab.hash}-{self.train.digest}-{self.valid.digest}"

    @classmethod
    def read(cls, folder: str, config: TrainConfig, vocab: Vocab | None = None) -> Corpora:
        """Read ``folder``'s train and valid text; build the vocabulary from the former unless one is given."""
        text = {split: read_corpus(folder, split) for split in ("train", "valid")}
        vocab = vocab or Vocab.build(text["train"], config.min_count, config.max_vocab)
        source = TokenStream if config.mode == "stream" else Sentences
        rare = 0.0 if has_unk(text["train"]) else config.rare_to_unk
        streams = {}
        for split, lines in text.items():
            try:
                streams[split] = source(lines, vocab, config.seq_len)
            except LowbitError as error:
                raise LowbitError(f"{corpus_file(folder, split)}: {error}") from None
            report_unknown(corpus_file(folder, split), streams[split])
        return cls(
            vocab,
            Batches(streams["train"], config.batch_size, rare, config.seed),
            Batches(streams["valid"], config.batch_size, seed=config.seed),
        )


def report_unknown(path: PathLike, text: TokenStream | Sentences) -> None:
    """Say on stderr, once among all processes, how many words of a text the vocabulary lacks."""
    if text.n_oov and os.environ.get("RANK", "0") == "0":
        share = f"{text.n_oov:,} of {text.n_words:,} words ({text.n_oov / text.n_words:.2%})"
        print(f"{path}: {share} unknown, read as <unk>", file=sys.stderr)


def add_run_options(p: argparse.ArgumentParser) -> None:
    """Options of every training stage."""
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the matrix products")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--restart", action="store_true", help="start anew, dropping an interrupted run's state")


def prepare_run(args: argparse.Namespace, seed: int) -> tuple[torch.device, str, Parallel]:
    """Device, precision and place among processes; says aloud what runs. Checks ``--out`` before hours of work."""
    check_writable(args.out)
    if args.threads is not None:
        if args.threads < 1:
            raise LowbitError(f"--threads must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if device.type == "cpu":
        release_freed_memory()
        keep_freed_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    parallel = Parallel(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.manual_seed(seed)
    if parallel.is_main:
        threads = f"{torch.get_num_threads()} threads x {parallel.world} processes"
        tiles = " on AMX tiles" if precision == "bf16" and device.type == "cpu" and has_bf16_tiles() else ""
        print(f"{args.stage}: {device}, {precision}{tiles}, {threads}", file=sys.stderr)
    return device, precision, parallel
