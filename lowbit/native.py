"""The native backend: the forward of csrc/cpu/engine.h over packed weights, without PyTorch in between.

The model is a :class:`~lowbit.model.TransformerLM` on packed matrices, of which only the weights are used: the same
object runs through :class:`~lowbit.backend.TorchBackend`, which makes the two easy to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lowbit import ops
from lowbit.backend import Block, check_tokens
from lowbit.errors import LowbitError
from lowbit.forest import Query, in_tree_order
from lowbit.layers import QuantEmbedding, QuantLinear
from lowbit.model import TransformerLM

# Nodes of one forward: enough that unpacking weights is cheap against multiplying by them, and so few that the
# activations stay in the cache of the cores.
TOKEN_BUDGET = 128


class NativeBackend:
    """A packed model on the CPU. Weights are shared by all calls; calls may come from any thread.

    Args:
        model: all of whose matrices are packed (:class:`QuantLinear`, :class:`QuantEmbedding`), as
            :func:`lowbit.loading.load_model` makes it.
        token_budget: nodes of a forward, which holds at least one tree.

    Raises:
        LowbitError: a matrix that is not packed, or matrices that differ in ``compute``.
    """

    name = "native"

    def __init__(self, model: TransformerLM, token_budget: int = TOKEN_BUDGET):
        ops.isa()  # the error of a bad LOWBIT_ISA
        self.config = model.config
        self._keep: list[Any] = []  # whatever the engine has addresses of
        self._engine = ops.native_engine(self._spec(model), token_budget)

    def log_probs(self, query: Query) -> np.ndarray:
        """fp32 [R]: natural log P(target | path to node) of every request of ``query``."""
        out = np.empty(len(query), np.float32)
        if len(query):
            native, _arrays = self._checked(query)
            self._engine.score(native, out.ctypes.data)
        return out

    def profile(self, query: Query) -> dict[str, float]:
        """Seconds that one thread spends on a query: "rows" (norms, activations, quantization), matrix "products",
        "attention", and "reduce" (log-sum-exp)."""
        out = np.empty(len(query), np.float32)
        native, _arrays = self._checked(query)
        return dict(zip(("rows", "products", "attention", "reduce"), self._engine.profile(native, out.ctypes.data)))

    def _checked(self, query: Query):
        """The extension's view of a query, and the arrays that it views."""
        query = in_tree_order(query)
        forest = query.forest
        check_tokens(self.config, forest.tokens, int(forest.depths.max()) + 1)
        check_tokens(self.config, query.targets, 0)
        arrays = [np.ascontiguousarray(a) for a in (forest.tokens, forest.parents, query.nodes, query.targets)]
        tokens, parents, nodes, targets = (a.ctypes.data for a in arrays)
        return ops.forest_query(len(forest), tokens, parents, len(query), nodes, targets), arrays

    def extend(
        self, past: Block | None, tokens: Sequence[int], distribution: bool = False
    ) -> tuple[Block, np.ndarray | None]:
        """See :meth:`lowbit.backend.Backend.extend`."""
        end = len(tokens) + (past.end if past else 0)
        try:
            node, found = self._engine.extend(past.data if past else None, tokens, distribution)
        except ValueError:
            check_tokens(self.config, tokens, end)  # says what is wrong
            raise
        return Block(None, end, node), found

    def next_log_probs(self, block: Block) -> np.ndarray:
        """fp32 [V]: natural log P of every token after the last one of ``block``."""
        return self._engine.log_probs(block.data)

    @property
    def cache_slots(self) -> int:
        """Tokens whose keys and values are kept for states that are still referred to."""
        return self._engine.cache_slots

    @property
    def cache_bytes(self) -> int:
        """Memory of the key-value cache; it grows with the states that live at a time, and is reused."""
        return self._engine.cache_bytes

    def _spec(self, model: TransformerLM) -> dict[str, Any]:
        """The model as the extension reads it: sizes, addresses, and views of matrices."""
        config = model.config
        embed = model.embed
        if not isinstance(embed, QuantEmbedding):
            raise LowbitError("the native engine runs packed models only; embed is not packed")
        self._compute = embed.compute
        head = (embed.packed, None) if model.head is None else self._quantized("head", model.head)
        positions = model._position_table if model.pos is None else model.pos.weight
        return {
            "vocab": config.vocab_size,
            "d": config.d_model,
            "heads": config.n_heads,
            "ffn": config.d_ffn,
            "max_len": config.max_len,
            "pre_norm": config.norm == "pre",
            "rotary": config.position == "rotary",
            "gelu": config.activation == "gelu",
            "exact": self._compute == "exact",
            "eps": config.norm_eps,
            "embed": self._matrix(embed.packed),
            "head": (self._matrix(head[0]), self._address(head[1])),
            "norm": None if model.norm is None else self._norm(model.norm),
            "positions": self._address(positions),
            "layers": [self._layer(i, layer) for i, layer in enumerate(model.layers)],
        }

    def _layer(self, index: int, layer: torch.nn.Module) -> dict[str, Any]:
        modules = {m: getattr(layer.attn, m) for m in "qkvo"} | {m: getattr(layer.mlp, m) for m in ("fc1", "fc2")}
        spec: dict[str, Any] = {"norm1": self._norm(layer.norm1), "norm2": self._norm(layer.norm2)}
        for name, module in modules.items():
            packed, bias = self._quantized(f"layers.{index}.{name}", module)
            spec[name] = (self._matrix(packed), self._address(bias))
        return spec

    def _quantized(self, name: str, module: torch.nn.Module) -> tuple[ops.PackedWeight, torch.Tensor | None]:
        if not isinstance(module, QuantLinear):
            raise LowbitError(f"the native engine runs packed models only; {name} is not packed")
        if module.compute != self._compute:
            raise LowbitError(f"{name} computes {module.compute}, the embedding {self._compute}")
        return module.packed, module.bias

    def _matrix(self, packed: ops.PackedWeight):
        self._keep.append(packed)
        return packed._native

    def _norm(self, norm: torch.nn.LayerNorm) -> tuple[int, int]:
        return self._address(norm.weight), self._address(norm.bias)

    def _address(self, tensor: torch.Tensor | None) -> int:
        """Of an fp32 copy that lives as long as the backend; 0 for none."""
        if tensor is None:
            return 0
        self._keep.append(tensor.detach().to("cpu", torch.float32).contiguous())
        return self._keep[-1].data_ptr()
