"""The engine on a GPU beside PyTorch in fp16, eager and compiled: decoding, and scoring of N-best lists.

    python bench/gpu_engine.py --out runs/gpu/engine.json
    python bench/gpu_engine.py --dry-run        no GPU: makes and checks the model, stops before the first launch

The model has the shape of the 24 M parameter PTB model (16 layers, d 380, 10 heads, inner 900, vocabulary 10,000) and
random weights at 2 bits, which cost the same time as trained ones; the fp16 models are its dequantized twins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lowbit import ModelConfig, load
from lowbit.backend import TorchBackend
from lowbit.container import PackedMatrix, PackedModel, read_packed, write_packed
from lowbit.forest import tries
from lowbit.model import TransformerLM, rotate
from lowbit.quantize import QuantTensor, table_tensor
from lowbit.tables import find_table
from lowbit.vocab import Vocab

PAPER = ModelConfig(vocab_size=10_000, d_model=380, n_layers=16, n_heads=10, d_ffn=900, max_len=256)
SMALL = ModelConfig(vocab_size=100, d_model=40, n_layers=2, n_heads=2, d_ffn=64, max_len=32)
TOKENS = 200  # decoded a run
TOLERANCE = 0.05  # nats, between fp16 models that round differently


def make_model(config: ModelConfig, path: Path) -> None:
    """A packed file of random 2-bit codes, scaled as trained matrices are."""
    gen = torch.Generator().manual_seed(0)
    table = find_table(2)
    matrices = {}
    for name, (n, k) in config.matrix_shapes().items():
        codes = torch.randint(0, 4, (n, k), generator=gen, dtype=torch.uint8)
        scale = ((torch.rand(n, 1, generator=gen) + 0.5) / (2.2 * k**0.5)).half()
        matrices[name] = PackedMatrix.from_quant_tensor(
            QuantTensor(codes, table_tensor(table), scale, 2, k, table.name)
        )
    vectors = {name: 0.02 * torch.randn(shape, generator=gen) for name, shape in config.vector_shapes().items()}
    vectors |= {name: 1 + v for name, v in vectors.items() if "norm" in name and name.endswith("weight")}
    vectors = {name: v.half().float() for name, v in vectors.items()}
    vocab = Vocab(["</s>", "<unk>", *(f"w{i}" for i in range(config.vocab_size - 2))])
    write_packed(path, PackedModel(config, vocab, matrices, vectors, 4 * config.n_parameters(), {"by": "bench"}))


def dense_twin(path: Path, device: str, dtype: torch.dtype) -> TransformerLM:
    """The same numbers in PyTorch's own modules."""
    packed = read_packed(path)
    model = TransformerLM(packed.config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, matrix in packed.matrices.items():
            own[f"{name}.weight"].copy_(matrix.to_quant_tensor().dequantize())
        for name, vector in packed.vectors.items():
            own[name].copy_(vector)
    return model.to(device, dtype).eval()


class StaticDecoder(torch.nn.Module):
    """One step of the dense model with a cache of fixed size: what torch.compile and its graphs want."""

    def __init__(self, model: TransformerLM, device: str):
        super().__init__()
        self.model, c = model, model.config
        shape = (c.n_layers, 2, 1, c.n_heads, c.max_len, c.head_dim)
        self.register_buffer("cache", torch.zeros(shape, dtype=torch.float16, device=device))
        self.register_buffer("places", torch.arange(c.max_len, device=device))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        model, c = self.model, self.model.config
        x = model._embed(token[None], position[None])
        angles = model._angles(token[None], position[None])
        mask = (self.places <= position)[None, None, None]
        for i, layer in enumerate(model.layers):
            h, a = layer.norm1(x), layer.attn
            q, k, v = (m(h).view(1, 1, c.n_heads, c.head_dim).transpose(1, 2) for m in (a.q, a.k, a.v))
            q, k = rotate(q, *angles), rotate(k, *angles)
            self.cache[i, 0].index_copy_(2, position, k)
            self.cache[i, 1].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, self.cache[i, 0], self.cache[i, 1], mask)
            x = x + a.o(y.transpose(1, 2).reshape(1, 1, -1))
            x = x + layer.mlp(layer.norm2(x), 0.0)
        return model.logits(model.norm(x))[0, 0].log_softmax(-1)


def decode(step: Callable[[object, int, int], tuple[object, np.ndarray]], tokens: int) -> float:
    """Greedy tokens a second from an empty context, with the distribution on the host each time.

    ``step(state, token, position)`` gives the next state and the log-probabilities after it.
    """
    best = 0.0
    for _ in range(3):
        state, token = None, 0
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(tokens):
            state, log_probs = step(state, token, i)
            token = int(log_probs.argmax())
        torch.cuda.synchronize()
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def decoding(lm, twin: TransformerLM) -> dict[str, float | str]:
    """Tokens a second of the engine, and of fp16 PyTorch eager (growing cache) and compiled (static cache)."""
    eager = TorchBackend(twin, "cuda")
    ours = lm.backend
    off = float(np.abs(ours.extend(None, [3], True)[1] - eager.extend(None, [3], True)[1]).max())
    if not off < TOLERANCE:
        raise SystemExit(f"bench: the engine differs from fp16 PyTorch by {off:g} nats")
    found: dict[str, float | str] = {"largest_difference_nats": off}
    found["lowbit"] = decode(lambda past, t, _: ours.extend(past, [t], True), TOKENS)
    found["fp16_eager"] = decode(lambda past, t, _: eager.extend(past, [t], True), TOKENS)
    graph = ours._step._graph
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20)
    found["lowbit_step_us"] = 1e3 * statistics.median(times)
    try:
        static = StaticDecoder(twin, "cuda")
        compiled = torch.compile(static, mode="reduce-overhead")
        with torch.inference_mode():
            where = [torch.tensor([i], device="cuda") for i in range(TOKENS)]

            def run(state: object, token: int, i: int) -> tuple[object, np.ndarray]:
                return None, compiled(torch.tensor([token], device="cuda"), where[i]).float().cpu().numpy()

            for i in range(4):
                run(None, 1, i)
            found["fp16_compiled"] = decode(run, TOKENS)
    except Exception as error:  # a failed baseline is reported, and the run goes on
        found["fp16_compiled"] = f"failed: {str(error).splitlines()[0][:200]}"
    return found


def scoring(lm, twin: TransformerLM) -> dict[str, float]:
    """Hypotheses a second of 64 lists of 50 hypotheses of 25 words with shared prefixes."""
    gen = np.random.default_rng(0)
    lists = []
    for _ in range(64):
        base = gen.integers(2, lm.config.vocab_size, 25)
        hyps = np.tile(base, (50, 1))
        at = gen.integers(5, 25, 50)
        hyps[np.arange(50), at] = gen.integers(2, lm.config.vocab_size, 50)
        lists.append(hyps.tolist())
    query, _ = tries(lists, lm.config.max_len, lm.config.max_len // 2)
    found, scores = {}, {}
    for name, backend in (("lowbit", lm.backend), ("fp16_eager", TorchBackend(twin, "cuda", 8192))):
        scores[name] = backend.log_probs(query)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            backend.log_probs(query)
            times.append(time.perf_counter() - start)
        found[f"{name}_hyps_per_s"] = 64 * 50 / statistics.median(times)
    off = float(np.abs(scores["lowbit"] - scores["fp16_eager"]).max())
    if not off < TOLERANCE:
        raise SystemExit(f"bench: scores differ from fp16 PyTorch by {off:g} nats")
    return found | {"largest_difference_nats": off, "tokens": len(query.forest)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/engine.json"))
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: a small model, up to the first launch")
    args = parser.parse_args(argv)
    config = SMALL if args.dry_run else PAPER
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.lowbit"
        make_model(config, path)
        if args.dry_run:
            lm, twin = load(path, device="cpu", compute="exact"), dense_twin(path, "cpu", torch.float32)
            a, b = lm.score(["w1 w2"])[0].logprob, TorchBackend(twin)
            query, _ = tries([[[3, 4]]], config.max_len, 8)
            off = abs(a - float(b.log_probs(query).sum()))
            assert off < 1e-3, off
            print(f"dry run: {config.n_parameters():,} parameters, packed file and dense twin agree to {off:.1e} nats")
            return 0
        lm, twin = load(path, device="cuda"), dense_twin(path, "cuda", torch.float16)
    result = {"gpu": torch.cuda.get_device_name(), "parameters": config.n_parameters(), "describe": lm.describe()}
    result["decoding_tokens_per_s"] = decoding(lm, twin)
    result["scoring"] = scoring(lm, twin)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    rate = result["decoding_tokens_per_s"]
    compiled, times = rate["fp16_compiled"], rate["lowbit"] / rate["fp16_eager"]
    print(f"decoding: {rate['lowbit']:.0f} tokens/s (a step {rate['lowbit_step_us']:.0f} us), {times:.1f}x fp16 eager")
    print(f"          fp16 eager {rate['fp16_eager']:.0f}, compiled {compiled}")
    score = result["scoring"]
    print(f"scoring: {score['lowbit_hyps_per_s']:.0f} hypotheses/s, fp16 eager {score['fp16_eager_hyps_per_s']:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
