"""Trainings of seconds, for the tests of training, ADMM and everything that starts from a checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lowbit.tools import train
from lowbit.tools.training.loop import Resume

MODEL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ffn": 128, "max_len": 32}
CONFIG = {
    "model": MODEL, "mode": "sentence", "seq_len": 16, "batch_size": 8, "epochs": 2, "lr": 0.01, "warmup": 5,
    "dropout": {"word": 0.1, "embed": 0.1, "residual": 0.1, "hidden": 0.1, "output": 0.1}, "rare_to_unk": 0.3,
    "evals": 4, "seed": 3,
}  # fmt: skip


def sentence(rng: random.Random) -> str:
    """Words w0 ... w39 whose number mostly rises by one or two: something to learn in a few steps."""
    at, words = rng.randrange(40), []
    for _ in range(rng.randrange(3, 15)):
        words.append(f"w{at}")
        at = (at + rng.choice((1, 1, 1, 2))) % 40
    return " ".join(words)


def write_data(folder: Path, sentences: int = 240) -> Path:
    """train.txt and valid.txt in ``folder``/data."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rng = random.Random(5)
    for split, n in (("train", sentences), ("valid", 40)):
        (data / f"{split}.txt").write_text("".join(sentence(rng) + "\n" for _ in range(n)))
    return data


def write_config(folder: Path, **overrides: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | overrides))
    return path


def train_argv(folder: Path, name: str = "fp.safetensors", **overrides: Any) -> list[str]:
    """Arguments of a training in ``folder``; fp32 on one thread, so that it is the same on every machine's cores."""
    config, out = write_config(folder, **overrides), str(folder / name)
    data = folder / "data" if (folder / "data").is_dir() else write_data(folder)
    return ["--data", str(data), "--config", str(config), "--out", out, "--precision", "fp32", "--threads", "1"]


def train_tiny(folder: Path, name: str = "fp.safetensors", **overrides: Any) -> Path:
    """A trained checkpoint."""
    assert train.main(train_argv(folder, name, **overrides)) == 0
    return folder / name


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make every run stop, as SIGTERM does, after its ``step``-th step."""
    calls = iter(range(1, 1_000_000))

    def due(self: Resume) -> bool:
        self._stop = next(calls) == step
        return self._stop

    patch.setattr(Resume, "due", due)
