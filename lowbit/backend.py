"""The seam between the engine and whatever computes: a forward over a forest with requested (node, next token) pairs.

:class:`TorchBackend` runs ``model.py``: the reference, and the path of GPUs and full-precision checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.forest import Forest, Group, Query, ancestor_masks, groups
from lowbit.model import TransformerLM

# fp32 logits that exist at a time: 8 MiB, what a core's share of the last cache holds.
LOGIT_BLOCK = 2**21


class Block(NamedTuple):
    """What a backend keeps of consecutive tokens of one path, opaque to the engine.

    Attributes:
        parent: the block before it, where the backend needs it.
        end: tokens from the beginning of the context to its last one.
        data: keys, values and the last token's output, in the backend's own form.
    """

    parent: Block | None
    end: int
    data: Any


class Backend(Protocol):
    """What an engine needs of an implementation. All methods are deterministic and may be called from any thread.

    Attributes:
        name: "native" or "torch".
    """

    name: str

    def log_probs(self, query: Query) -> np.ndarray:
        """fp32 [R]: natural log P(target | path to node) of every request of ``query``."""

    def extend(
        self, past: Block | None, tokens: Sequence[int], distribution: bool = False
    ) -> tuple[Block, np.ndarray | None]:
        """Read ``tokens`` after ``past`` (None: at the beginning of a context).

        Returns:
            the block of the tokens and, where ``distribution`` is asked for, what :meth:`next_log_probs` gives for it.
        """

    def next_log_probs(self, block: Block) -> np.ndarray:
        """fp32 [V]: natural log P of every token after the last one of ``block``."""


def check_tokens(config: ModelConfig, tokens: Sequence[int] | np.ndarray, length: int) -> None:
    """Raises LowbitError: a token outside the vocabulary, or a path of more tokens than the model's context."""
    low, high = (tokens.min(), tokens.max()) if isinstance(tokens, np.ndarray) else (min(tokens), max(tokens))
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise LowbitError(f"token {bad} is outside the vocabulary of {config.vocab_size}")
    if length > config.max_len:
        raise LowbitError(f"a path of {length} tokens is longer than the model's context of {config.max_len}")


class TorchBackend:
    """Forests as padded batches through :class:`~lowbit.model.TransformerLM`.

    Args:
        model: in evaluation mode.
        token_budget: padded tokens of a batch; bounds the memory of activations and attention.
    """

    name = "torch"

    def __init__(self, model: TransformerLM, device: str = "cpu", token_budget: int = 2048):
        self.model, self.device, self.token_budget = model.eval(), torch.device(device), token_budget

    @torch.inference_mode()
    def log_probs(self, query: Query) -> np.ndarray:
        forest = query.forest
        if not len(query):
            return np.empty(0, np.float32)
        check_tokens(self.model.config, forest.tokens, int(forest.depths.max()) + 1)
        check_tokens(self.model.config, query.targets, 0)
        out = np.empty(len(query), np.float32)
        by_node = np.argsort(query.nodes, kind="stable")
        sorted_nodes = query.nodes[by_node]
        for group in groups(forest, self.token_budget):
            flat = group.nodes.ravel()
            slots = np.flatnonzero(flat >= 0)
            first = np.searchsorted(sorted_nodes, flat[slots], "left")
            count = np.searchsorted(sorted_nodes, flat[slots], "right") - first
            slots, first, count = (x[count > 0] for x in (slots, first, count))
            if not len(slots):
                continue
            # Requests of the group in the order of the rows of its hidden states.
            within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            requests = by_node[np.repeat(first, count) + within]
            hidden = self._hidden(forest, group)[torch.from_numpy(slots).to(self.device)]
            out[requests] = self._target_log_probs(hidden, count, query.targets[requests])
        return out

    def _hidden(self, forest: Forest, group: Group) -> torch.Tensor:
        """fp32 [B * T, D]: final hidden states of a group."""
        real = group.nodes >= 0
        tokens = np.where(real, forest.tokens[group.nodes], 0).astype(np.int64)
        if group.chain:
            hidden, _ = self.model.hidden(self._to_device(tokens))
        else:
            positions = np.where(real, forest.depths[group.nodes], 0).astype(np.int64)
            mask = ancestor_masks(forest.parents, group.nodes)
            hidden, _ = self.model.hidden(*map(self._to_device, (tokens, positions, mask)))
        return hidden.flatten(0, 1)

    def _target_log_probs(self, hidden: torch.Tensor, count: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Output layer and log-sum-exp in blocks of rows; row i of hidden [n, D] has the next ``count[i]`` targets."""
        rows = max(1, LOGIT_BLOCK // self.model.config.vocab_size)
        ends = count.cumsum()
        out = np.empty(len(targets), np.float32)
        for start in range(0, len(hidden), rows):
            stop = min(start + rows, len(hidden))
            begin, end = ends[start] - count[start], ends[stop - 1]
            logits = self.model.logits(hidden[start:stop])
            row = self._to_device(np.repeat(np.arange(stop - start), count[start:stop]))
            wanted = logits[row, self._to_device(targets[begin:end])]
            out[begin:end] = (wanted - logits.logsumexp(-1)[row]).cpu().numpy()
        return out

    @torch.inference_mode()
    def extend(
        self, past: Block | None, tokens: Sequence[int], distribution: bool = False
    ) -> tuple[Block, np.ndarray | None]:
        row = np.asarray(tokens, dtype=np.int64)
        before, new = past.end if past else 0, len(row)
        check_tokens(self.model.config, row, before + new)
        positions = torch.arange(before, before + new, device=self.device)[None]
        cache = mask = None
        if past:
            path, at = [], past
            while at is not None:
                path.append(at.data[0])
                at = at.parent
            joined = torch.cat(path[::-1], dim=4)  # [L, 2, 1, H, P, hd]
            cache = [(kv[0], kv[1]) for kv in joined]
            mask = torch.ones(1, new, before + new, dtype=torch.bool, device=self.device).tril(before)
        hidden, kv = self.model.hidden(self._to_device(row[None]), positions, mask, cache)
        block = Block(past, before + new, (torch.stack([torch.stack(pair) for pair in kv]), hidden[0, -1].clone()))
        return block, self.next_log_probs(block) if distribution else None

    @torch.inference_mode()
    def next_log_probs(self, block: Block) -> np.ndarray:
        return self.model.logits(block.data[1][None])[0].log_softmax(-1).cpu().numpy()

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
