"""States of first-pass decoding and generation: nodes of a token forest that grows word by word (DESIGN section 6).

A state is immutable and keeps the keys and values of its own token only; those of its ancestors are shared.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from lowbit.backend import Backend, Block
from lowbit.errors import LowbitError
from lowbit.vocab import EOS_ID

# Next-token distributions are as large as the vocabulary: only those of the latest states are kept.
_KEPT_DISTRIBUTIONS = 64


class State:
    """A position in a text, made by :meth:`Decoder.begin` and :meth:`Decoder.append`.

    Attributes:
        length: tokens that this state's context holds.
        oov: out-of-vocabulary words on the way to it.
    """

    __slots__ = ("_block", "_decoder", "_distribution", "_parent", "_tokens", "length", "oov")

    def __init__(self, decoder: Decoder, parent: State | None, tokens: tuple[int, ...], oov: int):
        self._decoder, self._parent, self._tokens = decoder, parent, tokens
        self._block: Block | None = None
        self._distribution: np.ndarray | None = None
        self.length = len(tokens) + (parent.length if parent else 0)
        self.oov = oov

    def _path(self) -> list[State]:
        """This state and its ancestors, oldest first."""
        path, at = [], self
        while at is not None:
            path.append(at)
            at = at._parent
        return path[::-1]


class Decoder:
    """Makes and evaluates states; a state is only computed when its next-token distribution is asked for.

    A context that has reached ``max_len`` tokens loses its oldest ``stride``: where :func:`~lowbit.forest.windows` cuts
    a text, so that both see the same context at every position.
    """

    def __init__(self, backend: Backend, max_len: int, stride: int):
        self.backend, self.max_len, self.stride = backend, max_len, stride
        self._recent: deque[State] = deque()
        self._lock = threading.Lock()

    def begin(self, tokens: Sequence[int] = (), oov: int = 0) -> State:
        """The state after the sentence boundary and ``tokens``, read in one forward."""
        text = (EOS_ID, *tokens)
        dropped = max(0, -(-(len(text) - self.max_len) // self.stride)) * self.stride
        return State(self, None, text[dropped:], oov)

    def append(self, state: State, token: int, oov: int = 0) -> State:
        """The state one token further; ``oov`` of its words are out of vocabulary."""
        self._check(state)
        if state.length < self.max_len:
            return State(self, state, (token,), state.oov + oov)
        context = tuple(t for s in state._path() for t in s._tokens)
        return State(self, None, (*context[self.stride :], token), state.oov + oov)

    def log_probs(self, state: State) -> np.ndarray:
        """fp32 [V]: natural log P of every next token. Do not write to it."""
        self._check(state)
        found = state._distribution
        if found is None:
            found = state._distribution = self._distribution(state)
            with self._lock:
                self._recent.append(state)
                if len(self._recent) > _KEPT_DISTRIBUTIONS:
                    self._recent.popleft()._distribution = None
        return found

    def _distribution(self, state: State) -> np.ndarray:
        """The next-token distribution, and the state's block where it has none."""
        if state._block is not None:
            return self.backend.next_log_probs(state._block)
        block, parent = None, state._parent
        if parent is not None:
            block = parent._block or self._block(parent)
        # Two threads may compute the same block: both get the same numbers, and the last one stays.
        state._block, found = self.backend.extend(block, state._tokens, True)
        return found

    def _block(self, state: State) -> Block:
        """The block of a state that has none yet, and on the way those that its ancestors lack."""
        missing = [state]
        while (parent := missing[-1]._parent) is not None and parent._block is None:
            missing.append(parent)
        block = parent._block if parent is not None else None
        for at in reversed(missing):
            block, _ = self.backend.extend(block, at._tokens)
            at._block = block
        return block

    def _check(self, state: State) -> None:
        if not isinstance(state, State) or state._decoder is not self:
            raise LowbitError("this state was not made by this model's begin() or advance()")


def sample(log_probs: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    """Draw a token from log-probabilities fp32 [V]."""
    if temperature == 0:
        return int(log_probs.argmax())
    # Stable, so that the k best are the same words wherever several are equally probable.
    kept = np.argsort(-log_probs, kind="stable")[: top_k or len(log_probs)]
    logits = log_probs[kept].astype(np.float64)
    # The largest is subtracted first: divided by a tiny temperature it would be minus infinity itself.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    return int(kept[rng.choice(len(kept), p=weights / weights.sum())])
