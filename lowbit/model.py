"""The Transformer language model in PyTorch: the reference for every other implementation, and the training model.

Attention runs over token forests (DESIGN section 6): a mask says which earlier tokens a token sees; without one it is
causal. Norm, position, attention and MLP are separate pieces, so that another family is an addition, not a rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.config import ModelConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Dropout:
    """Dropout rates while training; masks are shared by all positions of a sequence (variational dropout).

    Attributes:
        word: whole rows of the embedding (Gal and Ghahramani 2016).
        embed: the embedding's output.
        residual: the output of attention and of the MLP.
        hidden: the MLP's hidden layer.
        output: the input of the output layer.
    """

    word: float = 0.0
    embed: float = 0.0
    residual: float = 0.0
    hidden: float = 0.0
    output: float = 0.0

    def scaled(self, factor: float) -> Dropout:
        """Every rate times ``factor``: quantization noise regularises, so low-bit training wants less (DESIGN 7)."""
        return Dropout(*(rate * factor for rate in (self.word, self.embed, self.residual, self.hidden, self.output)))


def variational_dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Drop features of x [B, T, D] with one mask [B, 1, D] for all positions.

    One random number for T activations also makes it nearly free, where element-wise dropout spends a sixth of a
    training step on a CPU in the random generator.
    """
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1 - rate))


def sinusoidal_positions(length: int, d_model: int) -> torch.Tensor:
    """fp32 [length, d_model] (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10_000.0) / d_model))
    table = torch.zeros(length, d_model, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: d_model // 2])
    return table.float()


def rotary_angles(length: int, head_dim: int) -> torch.Tensor:
    """fp32 [2, length, head_dim / 2]: cosines and sines (Su et al. 2021)."""
    rate = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + hd/2) of x [B, H, T, hd] by the angles of cos and sin, [B or 1, 1, T, hd / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention: q [B, H, T, hd], k and v [B, H, S, hd], mask bool [B, T, S] or None (causal) -> [B, H, T, hd].

    On a CPU PyTorch's fused kernel spends four times as long as these matrix products in the backward pass of short
    sequences, and no fused kernel has the double backward that Hessian-vector products need.
    """
    if q.is_cuda and not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None], is_causal=mask is None)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is None:
        hidden = torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
        scores = scores + hidden
    else:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention with projections ``q``, ``k``, ``v``, ``o``."""

    def __init__(self, config: ModelConfig, matrices: Mapping[str, nn.Module], prefix: str):
        super().__init__()
        self.heads, self.head_dim = config.n_heads, config.head_dim
        self.q, self.k, self.v, self.o = (matrices[f"{prefix}.{m}"] for m in "qkvo")

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        past: KeyValue | None,
    ) -> tuple[torch.Tensor, KeyValue]:
        batch, length, _ = x.shape
        q, k, v = (
            m(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        new = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        context = attend(q, k, v, mask)
        return self.o(context.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim)), new


class Mlp(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: ModelConfig, matrices: Mapping[str, nn.Module], prefix: str):
        super().__init__()
        self.fc1, self.fc2 = matrices[f"{prefix}.fc1"], matrices[f"{prefix}.fc2"]
        self.activation = F.gelu if config.activation == "gelu" else F.relu

    def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        return self.fc2(variational_dropout(self.activation(self.fc1(x)), rate, self.training))


class Block(nn.Module):
    """One layer, with LayerNorm before or after each residual branch."""

    def __init__(self, config: ModelConfig, matrices: Mapping[str, nn.Module], prefix: str):
        super().__init__()
        self.pre = config.norm == "pre"
        self.norm1 = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, matrices, f"{prefix}.attn")
        self.norm2 = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp = Mlp(config, matrices, f"{prefix}.mlp")

    def forward(self, x, angles, mask, past, dropout: Dropout) -> tuple[torch.Tensor, KeyValue]:
        branch, new = self.attn(self.norm1(x) if self.pre else x, angles, mask, past)
        x = x + variational_dropout(branch, dropout.residual, self.training)
        x = x if self.pre else self.norm1(x)
        branch = self.mlp(self.norm2(x) if self.pre else x, dropout.hidden)
        x = x + variational_dropout(branch, dropout.residual, self.training)
        return (x if self.pre else self.norm2(x)), new


class TransformerLM(nn.Module):
    """The paper's LM in all variants of :class:`~lowbit.config.ModelConfig`.

    Args:
        matrices: matrix name -> module, for a model on packed weights; by default ``nn.Embedding`` and ``nn.Linear``.
            A tied output layer calls ``matrices["embed"].project(hidden)`` where the module has it.
    """

    def __init__(self, config: ModelConfig, matrices: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.config, self.dropout = config, Dropout()
        matrices = _dense_matrices(config) if matrices is None else matrices
        self.embed = matrices["embed"]
        self.layers = nn.ModuleList(Block(config, matrices, f"layers.{i}") for i in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps) if config.norm == "pre" else None
        self.head = None if config.tied else matrices["head"]
        self.pos = nn.Embedding(config.max_len, config.d_model) if config.position == "learned" else None
        if self.pos is not None:
            nn.init.normal_(self.pos.weight, std=0.02)
        self.register_buffer("_position_table", _position_table(config), persistent=False)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: list[KeyValue] | None = None,
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Final hidden states.

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T], depth of every token in its text; None for 0 .. T-1.
            mask: bool [B, T, S], which of the S = cached + T tokens each token sees; None is causal and takes no cache.
            cache: per layer, keys and values [B, H, P, hd] of P earlier tokens, as returned.

        Returns:
            hidden [B, T, D], and the keys and values of the new tokens per layer.
        """
        x = self._embed(tokens, positions)
        angles = self._angles(tokens, positions)
        new = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, angles, mask, None if cache is None else cache[i], self.dropout)
            new.append(kv)
        x = x if self.norm is None else self.norm(x)
        return variational_dropout(x, self.dropout.output, self.training), new

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D] -> fp32 logits [..., V]."""
        if self.head is not None:
            return self.head(hidden).float()
        if hasattr(self.embed, "project"):
            return self.embed.project(hidden)
        return F.linear(hidden, self.embed.weight).float()

    @property
    def output_weight(self) -> nn.Parameter:
        """The matrix [V, D] of the output layer, for training losses that fuse it."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [B, T, V] of the token after each of ``tokens`` int64 [B, T]."""
        return self.logits(self.hidden(tokens)[0])

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        x = self.embed(tokens) * math.sqrt(self.config.d_model)
        if self.training and self.dropout.word > 0:
            # One draw per vocabulary entry and batch: every occurrence of a word is dropped together.
            keep = torch.rand(self.config.vocab_size, 1, device=x.device) >= self.dropout.word
            x = x * (keep.to(x.dtype) / (1 - self.dropout.word))[tokens]
        table = self.pos.weight if self.pos is not None else self._position_table
        if self.config.position != "rotary":
            x = x + (table[: tokens.shape[1]] if positions is None else table[positions])
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream in the autocast type halves the traffic of everything between the matrix products.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return variational_dropout(x, self.dropout.embed, self.training)

    def _angles(self, tokens, positions) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.config.position != "rotary":
            return None
        if positions is None:
            cos, sin = self._position_table[:, None, None, : tokens.shape[1]]
        else:
            cos, sin = self._position_table[:, positions][:, :, None]
        return cos, sin


def _position_table(config: ModelConfig) -> torch.Tensor:
    if config.position == "rotary":
        return rotary_angles(config.max_len, config.head_dim)
    if config.position == "sinusoidal":
        return sinusoidal_positions(config.max_len, config.d_model)
    return torch.empty(0)


def _dense_matrices(config: ModelConfig) -> dict[str, nn.Module]:
    """Full-precision matrices; rows of the embedding have unit norm on average, branches shrink with the depth."""
    modules: dict[str, nn.Module] = {}
    for name, (n, k) in config.matrix_shapes().items():
        if name == "embed":
            modules[name] = nn.Embedding(n, k)
        else:
            modules[name] = nn.Linear(k, n, bias=name != "head")
        std = k**-0.5
        if name.endswith((".o", ".fc2")):
            std /= math.sqrt(2 * config.n_layers)
        nn.init.normal_(modules[name].weight, std=std)
        if getattr(modules[name], "bias", None) is not None:
            nn.init.zeros_(modules[name].bias)
    return modules
