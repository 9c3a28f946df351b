"""What every search starts from: a full-precision checkpoint that says how it was trained, and its text."""

from __future__ import annotations

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.data import Batches, Sentences, TokenStream, corpus_file, has_unk, read_corpus
from lowbit.vocab import Vocab


def load_full_precision(path: PathLike) -> tuple[Checkpoint, TrainConfig]:
    """A checkpoint of `lowbit train` and its training configuration.

    Raises:
        LowbitError: it is already quantized, or says nothing of its training.
    """
    checkpoint = Checkpoint.load(path)
    if checkpoint.plan is not None:
        raise LowbitError(f"{path}: already quantized; precision is chosen for a full-precision checkpoint")
    if "train_config" not in checkpoint.info:
        raise LowbitError(f"{path}: says nothing of its training; a checkpoint of `lowbit train` is needed")
    return checkpoint, TrainConfig.from_dict(checkpoint.info["train_config"], str(path))


def split_training_text(folder: str, config: TrainConfig, vocab: Vocab, share: float) -> tuple[Batches, Batches]:
    """Batches of the training text in two parts, the second its last ``share`` of lines; no validation text is read.

    Raises:
        LowbitError: a part is too short for the model's context.
    """
    lines = read_corpus(folder, "train")
    cut = len(lines) - max(1, round(share * len(lines)))
    source = TokenStream if config.mode == "stream" else Sentences
    rare = 0.0 if has_unk(lines) else config.rare_to_unk
    try:
        parts = [source(part, vocab, config.seq_len) for part in (lines[:cut], lines[cut:])]
    except LowbitError as error:
        raise LowbitError(f"{corpus_file(folder, 'train')}: split at line {cut}: {error}") from None
    weights, precisions = (Batches(part, config.batch_size, rare, config.seed) for part in parts)
    return weights, precisions
