"""Time a training step of `lowbit train` beside the plain PyTorch loop it replaces, in one run.

    python bench/train_step.py [--steps 10] [--rounds 5] [--json FILE]

Both train 5.8 M parameters (d 256, 4 layers, FFN 1024, tied, vocabulary 10,000) on batches of 32 x 64 tokens in bf16
autocast with dropout. The plain loop is what one writes first: element-wise dropout, fused attention, `cross_entropy`
on the logits, `AdamW`. Rounds alternate, so that a drift of the machine's speed touches both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.config import ModelConfig
from lowbit.model import Dropout, TransformerLM
from lowbit.tools.training.data import Batch
from lowbit.tools.training.loop import Stepper
from lowbit.tools.training.parallel import Parallel

V, D, LAYERS, HEADS, FFN, B, T = 10_000, 256, 4, 4, 1024, 32, 64


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, FFN), nn.Linear(FFN, D)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.o(a.transpose(1, 2).reshape(b, t, D)), 0.1)
        return x + F.dropout(self.fc2(F.dropout(F.gelu(self.fc1(self.n2(x))), 0.1)), 0.1)


class PlainLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.pos = nn.Embedding(V, D), nn.Parameter(torch.zeros(T, D))
        self.blocks, self.norm = nn.ModuleList(PlainBlock() for _ in range(LAYERS)), nn.LayerNorm(D)

    def forward(self, tokens):
        x = F.dropout(self.embed(tokens) + self.pos, 0.1)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


def plain_step():
    model = PlainLM()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(tokens, targets):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(tokens).float().view(-1, V), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def lowbit_step():
    config = ModelConfig(V, D, LAYERS, HEADS, FFN, max_len=T, position="learned")
    model = TransformerLM(config)
    model.dropout = Dropout(word=0.1, embed=0.1, residual=0.1, hidden=0.1, output=0.1)
    device = torch.device("cpu")
    stepper = Stepper(model, Parallel(device), device, "bf16", 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(tokens, targets):
        optimizer.zero_grad(set_to_none=True)
        stepper.backward(Batch(tokens, targets))
        stepper.clip_gradients()
        optimizer.step()

    return step


def seconds(step, batch, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    return (time.perf_counter() - start) / steps


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, T + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    steps = {"plain": plain_step(), "lowbit": lowbit_step()}
    times = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, batch, 2)
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, batch, args.steps))
    ratios = [a / b for a, b in zip(times["plain"], times["lowbit"], strict=True)]
    result = {
        "plain_s": statistics.median(times["plain"]), "lowbit_s": statistics.median(times["lowbit"]),
        "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(f"plain {result['plain_s']:.3f} s, lowbit {result['lowbit_s']:.3f} s a step: "
          f"{result['ratio_median']:.2f} times ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
