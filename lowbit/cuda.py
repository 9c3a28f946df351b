"""The engine on a GPU: forests through the torch model on GPU kernels, decoding through a CUDA graph.

Scoring is :class:`~lowbit.backend.TorchBackend` with fp16 attention and an output layer that never writes its logits.
A decoding step costs launches, not arithmetic: it runs 7 kernels a layer (LayerNorm; q, k, v in one product where
their formats agree; attention with rotation and cache; o and the residual; LayerNorm; fc1 and activation; fc2 and the
residual), captured once and replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from lowbit.backend import Block, TorchBackend, check_tokens
from lowbit.gpu_layers import DTYPE, GpuEmbedding, GpuLinear, rows_of
from lowbit.kernels import GpuWeight, cuda, linear
from lowbit.kernels.launch import serves
from lowbit.kernels.weight import ROW_PAD
from lowbit.model import Attention, TransformerLM


class CudaBackend(TorchBackend):
    """What an engine needs, for a model of :mod:`lowbit.gpu_layers` modules.

    Args:
        model: in evaluation mode, on ``device``.
        device: "cuda"; "cpu" runs the same kernels in Triton's interpreter, without a graph (tests).
    """

    name = "cuda"

    def __init__(self, model: TransformerLM, device: str = "cuda", token_budget: int = 8192):
        super().__init__(model, device, token_budget)
        self._step: DecodeStep | None = None
        self._lock = threading.Lock()

    def _target_log_probs(self, hidden: torch.Tensor, count: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """fp32 [R]: logit of every target minus the row's log-sum-exp; logits of the vocabulary are never in memory."""
        from lowbit.kernels.logsumexp import log_sum_exp  # Triton is loaded by those who use it

        output = self.model.embed if self.model.head is None else self.model.head
        x = hidden.to(DTYPE).contiguous()
        row = self._to_device(np.repeat(np.arange(len(hidden)), count))
        wanted = rows_of(output.weight, self._to_device(targets))
        logits = (x[row].float() * wanted).sum(-1)
        return (logits - log_sum_exp(x, output.weight)[row]).cpu().numpy()

    @torch.inference_mode()
    def extend(
        self, past: Block | None, tokens: Sequence[int], distribution: bool = False
    ) -> tuple[Block, np.ndarray | None]:
        if len(tokens) != 1:
            return super().extend(past, tokens, distribution)
        check_tokens(self.model.config, np.asarray(tokens, dtype=np.int64), past.end + 1 if past else 1)
        with self._lock:
            if self._step is None:
                self._step = DecodeStep(self.model, self.device)
            block = self._step.run(past, int(tokens[0]))
            return block, self._step.log_probs.cpu().numpy() if distribution else None


class DecodeStep:
    """One token after a path that is in the cache: fixed buffers, and on a GPU one graph.

    The cache holds one path. A step whose past is the cache's own, or a beginning of it, costs one replay; of any
    other past the blocks that differ are copied in first.
    """

    def __init__(self, model: TransformerLM, device: torch.device):
        config = model.config
        self.model, self.device = model, device
        shape = (config.n_layers, 2, config.n_heads, config.max_len, config.head_dim)
        self.cache = torch.zeros(shape, dtype=DTYPE, device=device)
        self.token, self.position = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.x = torch.zeros(1, config.d_model, device=device)  # the residual stream
        self.normed, self.context = (_padded(config.d_model, device) for _ in range(2))
        self.inner = _padded(config.d_ffn, device)
        self.log_probs = torch.zeros(config.vocab_size, device=device)
        self.qkv = [fuse([a.q, a.k, a.v]) for a in (layer.attn for layer in model.layers)]
        self._held: list[Block] = []
        self._stream: torch.cuda.Stream | None = None  # of the last step
        self._graph = self._capture() if device.type == "cuda" else None

    def run(self, past: Block | None, token: int) -> Block:
        """The block of ``token`` after ``past``; the log-probabilities of what follows are in ``log_probs``."""
        if self.device.type == "cuda":
            self._follow(torch.cuda.current_stream(self.device))
        at = self._bring(past)
        self.token.fill_(token)
        self.position.fill_(at)
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()
        kv = self.cache[:, :, None, :, at : at + 1].clone()
        block = Block(past, at + 1, (kv, self.normed[0, : self.x.shape[1]].float()))
        self._held.append(block)
        return block

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Steps share the cache and their buffers: a thread with another current stream waits for the step before."""
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _bring(self, past: Block | None) -> int:
        """Make the cache hold the path to ``past``; its length in tokens."""
        path: list[Block] = []
        if not self._held or past is not self._held[-1]:  # else: the next token of the same path
            at = past
            while at is not None:
                path.insert(0, at)
                at = at.parent
            same = 0
            while same < min(len(path), len(self._held)) and path[same] is self._held[same]:
                same += 1
            del self._held[same:], path[:same]
        for block in path:
            start = block.parent.end if block.parent else 0
            self.cache[:, :, :, start : block.end] = block.data[0][:, :, 0]
            self._held.append(block)
        return self._held[-1].end if self._held else 0

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the step. Run before: kernels are compiled and workspaces made outside of the recording."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._forward()
        self.cache.zero_()
        return graph

    def _forward(self) -> None:
        from lowbit.kernels.decode import attend_one, layer_norm

        model, x = self.model, self.x
        x.copy_(model._embed(self.token[None], self.position[None])[0])
        angles = model._position_table if model.config.position == "rotary" else None
        for i, layer in enumerate(model.layers):
            if layer.pre:
                layer_norm(x, layer.norm1, self.normed, False)
            elif i == 0:
                self.normed[:, : x.shape[1]] = x
            q, k, v = self._project(layer.attn, i)
            attend_one(q, k, v, angles, self.cache[i], self.position, self.context)
            self._product(layer.attn.o, self.context, x, residual=x)
            layer_norm(x, layer.norm2 if layer.pre else layer.norm1, self.normed, not layer.pre)
            activation = model.config.activation
            self._product(layer.mlp.fc1, self.normed, self.inner[:, : model.config.d_ffn], activation=activation)
            self._product(layer.mlp.fc2, self.inner, x, residual=x)
            if not layer.pre:
                layer_norm(x, layer.norm2, self.normed, True)
        if model.norm is not None:
            layer_norm(x, model.norm, self.normed, False)
        output = model.embed if model.head is None else model.head
        logits = torch.empty(1, model.config.vocab_size, device=self.device)
        self._product(output, self.normed, logits)
        self.log_probs.copy_(logits[0].log_softmax(-1))

    def _project(self, attention: Attention, i: int) -> tuple[torch.Tensor, ...]:
        """q, k, v of the normed row: 16-bit [heads * head_dim] each."""
        size = self.x.shape[1]
        fused = self.qkv[i]
        if fused is None:
            out = [torch.empty(1, size, dtype=DTYPE, device=self.device) for _ in range(3)]
            for module, y in zip((attention.q, attention.k, attention.v), out):
                self._product(module, self.normed, y)
            return tuple(y[0] for y in out)
        y = torch.empty(1, fused.weight.shape[0], dtype=DTYPE, device=self.device)
        self._product(fused, self.normed, y)
        pitch = fused.weight.shape[0] // 3
        return tuple(y[0, j * pitch : j * pitch + size] for j in range(3))

    def _product(
        self,
        module: GpuLinear | GpuEmbedding,
        x: torch.Tensor,
        y: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        """y = residual + activation(x W^T + bias); x [1, K rounded up to 8], zero from K on."""
        weight, bias = module.weight, getattr(module, "bias", None)
        if serves(weight.bits, 1, self.device) == "cuda":
            cuda.linear(x, weight, bias, y, residual, activation)
        else:
            y.copy_(linear(x[:, : weight.shape[1]], weight, bias, y.dtype, None, residual, activation))


def _padded(size: int, device: torch.device) -> torch.Tensor:
    """A row of activations that the kernels read without copying it: zeros up to a multiple of 8."""
    return torch.zeros(1, -(-size // 8) * 8, dtype=DTYPE, device=device)


def fuse(modules: Sequence[GpuLinear]) -> GpuLinear | None:
    """Matrices of one input as one, each padded to whole blocks of 64 outputs; None where their formats differ.

    The modules' own weights become views of the result, so that nothing is in memory twice; grouped scales, which
    cannot be views, are.
    """
    weights = [m.weight for m in modules]
    first = weights[0]
    if any(
        (w.shape, w.bits, w.group, w.levels) != (first.shape, first.bits, first.group, first.levels) for w in weights
    ):
        return None
    codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights], dim=1)
    rows, k = first.padded_rows, first.shape[1]
    bias = torch.zeros(len(modules), rows, device=codes.device)
    blocks = len(first.codes)
    for i, (module, w) in enumerate(zip(modules, weights)):
        part = codes[i * blocks : (i + 1) * blocks]
        module.weight = GpuWeight(part, scales[:, i * rows : (i + 1) * rows], w.table, w.shape, w.bits, w.group)
        if module.bias is not None:
            bias[i, : w.shape[0]] = module.bias
    shape = (len(modules) * rows, k)
    assert shape[0] % ROW_PAD == 0
    return GpuLinear(GpuWeight(codes, scales, first.table, shape, first.bits, first.group), bias.flatten())
