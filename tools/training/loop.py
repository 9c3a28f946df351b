"""One optimiser step, validation, schedules, and a state that resumes exactly."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from lowbit.errors import LowbitError
from lowbit.files import atomic_path
from lowbit.model import TransformerLM
from lowbit.tools.training.data import IGNORED, Batch, Batches
from lowbit.tools.training.loss import linear_cross_entropy
from lowbit.tools.training.parallel import Parallel
from lowbit.tools.training.tile_layers import use_tiles

SAVE_SECONDS = 60.0


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise LowbitError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def learning_rate(step: int, total: int, peak: float, warmup: int, schedule: str = "cosine") -> float:
    """Linear warm-up, then cosine to 0, or constant (the plateau schedule scales ``peak`` itself)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "plateau":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ppl_note(nll: float) -> str:
    """What progress shows of a validation: nothing before the first one."""
    return f"valid PPL {math.exp(min(nll, 50.0)):.2f}" if math.isfinite(nll) else ""


@dataclass
class Stepper:
    """Forward, backward and update of one model on one device, over all processes.

    Attributes:
        precision: "bf16" runs matrix products under autocast, "fp32" does not.
    """

    model: TransformerLM
    parallel: Parallel
    device: torch.device
    precision: str
    clip: float

    def __post_init__(self) -> None:
        use_tiles(self.model)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(
        self, batch: Batch, teacher: TransformerLM | None = None, distill: float = 0.0
    ) -> tuple[float, torch.Tensor]:
        """Gradients of the mean loss over the whole batch; returns (tokens of the batch, mean NLL as a tensor)."""
        count = batch.n_targets
        shard = batch.shard(self.parallel.rank, self.parallel.world)
        with self.autocast():
            loss, nll = self.losses(shard, teacher, distill)
        (loss / count).backward()
        parameters = list(self.model.parameters())
        self.parallel.sum_gradients(parameters)
        return count, nll.detach() / count

    def losses(self, batch: Batch, teacher: TransformerLM | None = None, distill: float = 0.0):
        """Summed loss and summed NLL of a batch."""
        tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
        valid = targets != IGNORED
        hidden = self.model.hidden(tokens)[0][valid]
        teacher_hidden = teacher_weight = None
        if teacher is not None and distill > 0:
            with torch.no_grad():
                teacher_hidden, teacher_weight = teacher.hidden(tokens)[0][valid], teacher.output_weight
        return linear_cross_entropy(
            hidden, self.model.output_weight, targets[valid], teacher_hidden, teacher_weight, distill
        )

    def clip_gradients(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)

    @torch.no_grad()
    def validate(self, batches: Batches) -> float:
        """Mean NLL (nats a token) of a corpus, every token once, in the training precision."""
        self.model.eval()
        total, count = 0.0, 0.0
        for i, batch in enumerate(batches.evaluation()):
            if i % self.parallel.world == self.parallel.rank:
                with self.autocast():
                    total += self.losses(batch)[1].item()
                count += batch.n_targets
        self.model.train()
        total, count = self.parallel.sum(total, count)
        return total / count


class Epochs:
    """Walks through the batches of all epochs; its position is two integers."""

    def __init__(self, batches: Batches, epoch: int = 0, index: int = 0):
        self.batches, self.epoch, self.index = batches, epoch, index
        self._current = batches.epoch(epoch)

    def __next__(self) -> Batch:
        while self.index >= len(self._current):
            self.epoch, self.index = self.epoch + 1, 0
            self._current = self.batches.epoch(self.epoch)
        self.index += 1
        return self._current[self.index - 1]

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}


def run_identity(stepper: Stepper, corpora_digest: str) -> dict[str, Any]:
    """What must be the same for an interrupted run to go on: text, start weights, precision, processes."""
    weights = xxhash.xxh3_64()
    for parameter in stepper.model.parameters():
        weights.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return {
        "text": corpora_digest, "start": weights.hexdigest(), "precision": stepper.precision,
        "processes": stepper.parallel.world,
    }  # fmt: skip


class Resume:
    """The file beside an output from which an interrupted run goes on, and the log of its steps.

    It is written every minute and when the process is asked to stop (SIGINT, SIGTERM), and removed at the end. A state
    of another run (other configuration, data or plan: the ``identity``) is refused, never silently restarted.
    """

    def __init__(self, out: str, identity: dict[str, Any], parallel: Parallel, restart: bool = False):
        self.path, self.log_path = Path(f"{out}.resume"), Path(f"{out}.log.jsonl")
        self.identity, self.parallel = json.dumps(identity, sort_keys=True), parallel
        self._last, self._stop = time.monotonic(), False
        if restart and parallel.is_main:
            self.path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The saved state, with this process's random generator restored; None for a fresh start."""
        if not self.path.is_file():
            if self.parallel.is_main:
                self.log_path.unlink(missing_ok=True)
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise LowbitError(f"{self.path}: damaged resume file ({error}); remove it or pass --restart") from None
        if state["identity"] != self.identity:
            raise LowbitError(
                f"{self.path}: left by a run with other settings, plan or data; finish that run, or pass --restart"
            )
        _set_rng(state["rng"][self.parallel.rank])
        if self.parallel.is_main and self.log_path.is_file():
            # Lines written after the last save are written again.
            os.truncate(self.log_path, min(state["log_bytes"], self.log_path.stat().st_size))
        return state

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a stop between two steps."""

        def ask(_signal, _frame):
            self._stop = True

        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def due(self) -> bool:
        """Whether to save now: a minute has passed or a stop was asked for, on any process."""
        wanted = self._stop or time.monotonic() - self._last > SAVE_SECONDS
        return self.parallel.sum(float(wanted))[0] > 0 if self.parallel.world > 1 else wanted

    def save(self, state: dict[str, Any]) -> None:
        """Save, then leave if a stop was asked for."""
        log_bytes = self.log_path.stat().st_size if self.log_path.is_file() else 0
        state = state | {"identity": self.identity, "rng": self.parallel.gather(_get_rng()), "log_bytes": log_bytes}
        if self.parallel.is_main:
            with atomic_path(self.path) as temporary:
                torch.save(state, temporary)
        self._last = time.monotonic()
        if self.parallel.sum(float(self._stop))[0] > 0:
            raise KeyboardInterrupt

    def log(self, **record: Any) -> None:
        if self.parallel.is_main:
            with open(self.log_path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

    def finish(self) -> None:
        if self.parallel.is_main:
            self.path.unlink(missing_ok=True)


def _get_rng() -> dict[str, torch.Tensor]:
    """State of every generator that a training draws from on this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
