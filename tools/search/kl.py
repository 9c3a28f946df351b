"""How far quantizing one matrix moves the model's predictions: KL(full precision || quantized), in two contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from lowbit.model import TransformerLM
from lowbit.tools.training.data import IGNORED, Batch

CONTEXT_CHOICE = "2"  # of all other matrices in the second context


class KlProbe:
    """KL of every matrix at every choice on a batch.

    First context: all other matrices at full precision. Second: all others at 2 bits, where errors have accumulated;
    there the KL of the matrix at full precision is subtracted, so that both contexts measure what the matrix adds. The
    average of both counts.

    Args:
        images: matrix -> choice -> Q_b(W), with the choice "2" among them.
    """

    def __init__(
        self,
        model: TransformerLM,
        weights: Mapping[str, torch.nn.Parameter],
        images: Mapping[str, Mapping[str, torch.Tensor]],
        choices: Sequence[str],
    ):
        self.model, self.weights, self.images, self.choices = model, weights, images, list(choices)
        self.originals = {name: w.data for name, w in weights.items()}

    @torch.no_grad()
    def measure(self, batch: Batch) -> np.ndarray:
        """fp64 [matrices, 2 contexts, choices], nats a token."""
        out = np.zeros((len(self.weights), 2, len(self.choices)))
        self._target = self._log_probs(batch)
        for i, name in enumerate(self.weights):
            out[i, 0] = [self._divergence(batch, {name: self.images[name][c]}) for c in self.choices]
        low = {name: by_choice[CONTEXT_CHOICE] for name, by_choice in self.images.items()}
        for i, name in enumerate(self.weights):
            alone = self._divergence(batch, low | {name: self.originals[name]})
            raised = [self._divergence(batch, low | {name: self.images[name][c]}) for c in self.choices]
            out[i, 1] = np.subtract(raised, alone)
        return out

    def _divergence(self, batch: Batch, changed: Mapping[str, torch.Tensor]) -> float:
        with holding(self.weights, changed):
            log_q = self._log_probs(batch)
        return float((self._target.exp() * (self._target - log_q)).sum(-1).double().mean())

    def _log_probs(self, batch: Batch) -> torch.Tensor:
        device = self.model.output_weight.device
        return self.model(batch.tokens.to(device))[batch.targets.to(device) != IGNORED].log_softmax(-1)


@contextlib.contextmanager
def holding(weights: Mapping[str, torch.nn.Parameter], changed: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, the named parameters hold other values."""
    before = {name: weights[name].data for name in changed}
    for name, value in changed.items():
        weights[name].data = value
    try:
        yield
    finally:
        for name, value in before.items():
            weights[name].data = value
