"""What storing biases and norms as fp16 in a packed file saves, and what it costs (docs/FORMAT.md).

    python bench/fp16_vectors.py fp.safetensors --text valid.txt [--lines 200] [--json FILE]

Scores the same sentences with the checkpoint and with its vectors rounded to fp16; matrices stay fp32.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.files import read_lines
from lowbit.model import TransformerLM


@torch.inference_mode()
def log_probs(model: TransformerLM, sentences: list[list[int]]) -> torch.Tensor:
    """Natural log P of every sentence, end included: fp64 [sentences]."""
    totals = []
    for ids in sentences:
        hidden, _ = model.hidden(torch.tensor([[0, *ids]]))
        scores = torch.log_softmax(model.logits(hidden[0]).double(), -1)
        totals.append(scores[torch.arange(len(ids) + 1), torch.tensor([*ids, 0])].sum())
    return torch.stack(totals)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("--text", required=True)
    p.add_argument("--lines", type=int, default=200)
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    checkpoint = Checkpoint.load(args.checkpoint)
    config = checkpoint.config
    lines = read_lines(args.text)[: args.lines]
    sentences = [checkpoint.vocab.encode(line)[0][: config.max_len - 1] for line in lines]
    before = log_probs(checkpoint.build_model(), sentences)
    for name in config.vector_shapes():
        checkpoint.tensors[name] = checkpoint.tensors[name].half().float()
    after = log_probs(checkpoint.build_model(), sentences)
    predictions = sum(len(s) + 1 for s in sentences)
    perplexity, rounded = (math.exp(-float(x.sum()) / predictions) for x in (before, after))
    result = {
        "parameters": config.n_parameters(),
        "fp16_nbytes": 2 * sum(math.prod(shape) for shape in config.vector_shapes().values()),
        "sentences": len(sentences),
        "max_log_prob_change": float((before - after).abs().max()),
        "perplexity": perplexity,
        "relative_perplexity_change": rounded / perplexity - 1,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
