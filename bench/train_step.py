"""Time a training step of `lowbit train` and `lowbit admm` beside what they replace, alternating in one run.

    python bench/train_step.py [--stage train|admm|straight-through ...] [--steps 8] [--rounds 5] [--json FILE]

All train 5.8 M parameters (d 256, 4 layers, FFN 1024, tied, vocabulary 10,000) on batches of 32 x 64 tokens in bf16
autocast with dropout. Variants, each in a process of its own, since one of them changes the allocator:

    plain    what one writes first: element-wise dropout, fused attention, `cross_entropy` on the logits, `AdamW`
             (stage train only)
    torch    lowbit's step in PyTorch's operations, as it runs where the extension's kernels do not apply
    lowbit   lowbit's step

The stages of `lowbit admm` (2 bits) learn from a teacher of the same size: "admm" pulls the weights towards their
quantized image, "straight-through" quantizes all matrices every step and re-fits their scales every tenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.config import ModelConfig
from lowbit.model import Dropout, TransformerLM
from lowbit.plan import MatrixPlan
from lowbit.tools.training import native
from lowbit.tools.training.admm import REFIT_EVERY
from lowbit.tools.training.allocator import keep_freed_memory
from lowbit.tools.training.data import Batch
from lowbit.tools.training.loop import Stepper
from lowbit.tools.training.parallel import Parallel
from lowbit.tools.training.quantized import QuantizedMatrix
from lowbit.tools.training.tile_layers import use_tiles

STAGES = ["train", "admm", "straight-through"]
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


def lowbit_model() -> TransformerLM:
    return TransformerLM(ModelConfig(V, D, LAYERS, HEADS, FFN, max_len=T, position="learned"))


def lowbit_step(stage: str):
    model, device = lowbit_model(), torch.device("cpu")
    model.dropout = Dropout(word=0.1, embed=0.1, residual=0.1, hidden=0.1, output=0.1)
    stepper = Stepper(model, Parallel(device), device, "bf16", 1.0)
    teacher, matrices, distill = None, [], 0.0
    if stage != "train":
        teacher, distill = use_tiles(lowbit_model().eval()), 0.5
        names = model.config.matrix_shapes()
        parameters = dict(model.named_parameters())
        matrices = [QuantizedMatrix(parameters[f"{name}.weight"], MatrixPlan(2)) for name in names]
    trained = list(model.parameters())
    for m in matrices:
        if stage == "admm":
            m.set_target()
        else:
            m.start_hard()
            trained = [m.latent if p is m.weight else p for p in trained]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)
    count = 0

    def step(tokens, targets):
        nonlocal count
        count += 1
        model.zero_grad(set_to_none=True)
        stepper.backward(Batch(tokens, targets), teacher, distill)
        stepper.clip_gradients()
        for m in matrices if stage == "straight-through" else ():
            m.pass_gradient()
        optimizer.step()
        for m in matrices:
            if stage == "admm":
                m.weight.data.lerp_(m.target, 1e-3)
            else:
                m.load_quantized(refit=count % REFIT_EVERY == 0)

    return step


def seconds(step, batch, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    return (time.perf_counter() - start) / steps


def work(stage: str, variant: str, steps: int) -> None:
    """Child process: one timing, in seconds a step, for every line read."""
    if variant == "torch":
        native.suits = native.suits_rows = native.suits_tiles = lambda *_: False
    elif variant == "lowbit":
        keep_freed_memory()
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, T + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    step = plain_step() if variant == "plain" else lowbit_step(stage)
    seconds(step, batch, 2)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(seconds(step, batch, steps), flush=True)


def measure(stage: str, steps: int, rounds: int) -> dict:
    """Seconds a step of every variant and how many times as fast lowbit is: medians over rounds, and the spread."""
    variants = ["plain", "torch", "lowbit"] if stage == "train" else ["torch", "lowbit"]
    workers = {}
    times = {name: [] for name in variants}
    for name in variants:
        argv = [sys.executable, __file__, "--worker", stage, name, "--steps", str(steps)]
        workers[name] = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers[name].stdout.readline()  # one after the other, so that only one computes at a time
    for _ in range(rounds):
        for name, worker in workers.items():
            print(file=worker.stdin, flush=True)
            times[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    result = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    for name in variants[:-1]:
        ratios = [a / b for a, b in zip(times[name], times["lowbit"], strict=True)]
        result[f"over_{name}"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        work(*args.worker, args.steps)
        return
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__, "tiles": native.has_bf16_tiles()}
    for stage in args.stage:
        found = result[stage] = measure(stage, args.steps, args.rounds)
        for name in (key.removeprefix("over_") for key in found if key.startswith("over_")):
            r = found[f"over_{name}"]
            print(f"{stage}: {name} {found[f'{name}_s']:.3f} s, lowbit {found['lowbit_s']:.3f} s a step: "
                  f"{r['median']:.2f} times ({r['min']:.2f} to {r['max']:.2f})")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
