"""What every search starts from: a full-precision checkpoint that says how it was trained."""

from __future__ import annotations

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.tools.training.config import TrainConfig


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
