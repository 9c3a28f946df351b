"""What the engine is measured against: the same size of LM in eager PyTorch the way speech toolkits run it.

One padded batch an utterance, logits over the vocabulary, log-softmax, gather; duplicate hypotheses are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from engine_model import CONFIG
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        d, f = CONFIG.d_model, CONFIG.d_ffn
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: torch.Tensor, past: tuple | None = None) -> tuple[torch.Tensor, tuple]:
        batch, length, d = x.shape
        heads = CONFIG.n_heads
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.o(context.transpose(1, 2).reshape(batch, length, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), (k, v)


class FloatLM(nn.Module):
    """fp32, random weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CONFIG.vocab_size, CONFIG.d_model)
        self.pos = nn.Parameter(torch.zeros(CONFIG.max_len, CONFIG.d_model))
        self.blocks = nn.ModuleList(Block() for _ in range(CONFIG.n_layers))
        self.norm = nn.LayerNorm(CONFIG.d_model)
        self.head = nn.Linear(CONFIG.d_model, CONFIG.vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def logits(self, ids: torch.Tensor, past: list | None = None, at: int = 0) -> tuple[torch.Tensor, list]:
        x, cache = self.embed(ids) + self.pos[at : at + ids.shape[1]], []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, None if past is None else past[i])
            cache.append(kv)
        return self.head(self.norm(x)), cache

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows int64 [B, T + 1] -> log P of the last T tokens of every row, fp32 [B, T]."""
        logits = self.logits(rows[:, :-1])[0].float()
        return logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]


class TorchRival:
    def __init__(self, name: str):
        torch.manual_seed(0)
        self.name, self.bf16, model = name, "bf16" in name, FloatLM().eval()
        if "int8" in name:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        self.model = model

    @torch.no_grad()
    def score(self, rows: torch.Tensor) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.model(rows).numpy()

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        token, past = torch.zeros(1, 1, dtype=torch.long), None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            for at in range(tokens):
                logits, past = self.model.logits(token, past, at)
                logits[0, -1].float().log_softmax(-1)


class OnnxRival:
    """The same graph in ONNX Runtime; "int8" by its dynamic quantization."""

    def __init__(self, name: str, folder: Path, threads: int):
        import onnxruntime

        self.name, path = name, folder / "float.onnx"
        if not path.exists():
            torch.manual_seed(0)
            axes = {"rows": {0: "b", 1: "t"}, "out": {0: "b", 1: "s"}}
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    FloatLM().eval(), (torch.zeros(2, 9, dtype=torch.long),), str(path), input_names=["rows"],
                    output_names=["out"], dynamic_axes=axes, dynamo=False, opset_version=17,
                )  # fmt: skip
        if "int8" in name:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            source, path = path, folder / "int8.onnx"
            if not path.exists():
                quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def score(self, rows: torch.Tensor) -> np.ndarray:
        return self.session.run(None, {"rows": rows.numpy()})[0]


def padded(hyps: Sequence[Sequence[int]]) -> torch.Tensor:
    """Distinct hypotheses as one batch [B, T + 1], ``</s>`` around each and as padding."""
    distinct = list(dict.fromkeys(map(tuple, hyps)))
    width = max(map(len, distinct)) + 2
    return torch.tensor([(0, *h, *([0] * (width - 1 - len(h)))) for h in distinct])
