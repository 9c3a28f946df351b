"""A packed model of the size that the paper's tables are about, with random weights: speed only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch

from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel, write_packed
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=10_000, d_model=512, n_layers=6, n_heads=8, d_ffn=2048, max_len=128, position="learned")
# 2 bits on average, in three widths: q, k and v weigh the same.
BITS = {"q": 1, "k": 1, "v": 4}


def words_of(paths: list[Path]) -> Vocab:
    """The words of N-best lists (.jsonl) and texts, the most frequent first, filled up to the model's vocabulary."""
    counts: Counter[str] = Counter()
    for path in paths:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                texts = [h["text"] for h in json.loads(line)["hyps"]] if path.suffix == ".jsonl" else [line]
                for text in texts:
                    counts.update(text.split())
    words = [w for w, _ in counts.most_common() if w not in ("</s>", "<unk>")][: CONFIG.vocab_size - 2]
    return Vocab(["</s>", "<unk>", *words, *(f"filler{i}" for i in range(CONFIG.vocab_size - 2 - len(words)))])


def write_random_model(path: Path, vocab: Vocab, config: ModelConfig = CONFIG) -> None:
    """Pack Gaussian matrices, unit norms and small biases."""
    gen = torch.Generator().manual_seed(0)
    matrices = {}
    for name, (n, k) in config.matrix_shapes().items():
        weight = torch.randn(n, k, generator=gen) * k**-0.5
        matrices[name] = PackedMatrix.from_quant_tensor(quantize(weight, BITS.get(name.rsplit(".", 1)[-1], 2)))
    vectors = {}
    for name, shape in config.vector_shapes().items():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        vectors[name] = (center + 0.02 * torch.randn(shape, generator=gen)).half().float()
    write_packed(path, PackedModel(config, vocab, matrices, vectors, 4 * config.n_parameters()))
