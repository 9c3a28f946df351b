"""Train a full-precision Transformer language model: text -> fp.safetensors (DESIGN sections 6 and 7)."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.tools import cli
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.loop import Epochs, Resume, Stepper, learning_rate, ppl_note, run_identity
from lowbit.tools.training.start import Corpora, add_run_options, prepare_run
from lowbit.tools.training.tile_layers import use_tiles

PLATEAU_FACTOR = 0.25


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "train",
        "lowbit train --data data/ptb --config ptb-small --out runs/ptb/fp.safetensors\n"
        "torchrun --nproc-per-node 2 tools/train.py --data data/ptb --config ptb-small --out fp.safetensors",
        "An interrupted training goes on exactly where it was when the same command is given again.\n"
        "Beside OUT it keeps OUT.log.jsonl (one JSON object per validation) and, until it ends, OUT.resume.",
    )
    p.add_argument("--data", required=True, metavar="DIR", help="folder with train.txt and valid.txt (or *.train.txt)")
    p.add_argument("--config", required=True, metavar="NAME|FILE", help="a named configuration or a JSON file")
    p.add_argument("--out", required=True, metavar="FILE", help="checkpoint to write (safetensors)")
    p.add_argument("--epochs", type=float, help="override the configuration's epochs")
    p.add_argument("--seed", type=int, help="override the configuration's seed")
    p.add_argument("--lr", type=float, help="override the configuration's peak learning rate")
    p.add_argument("--warmup", type=int, metavar="STEPS", help="override the configuration's warm-up")
    p.add_argument("--dropout-scale", type=float, default=1.0, metavar="F", help="factor on every dropout rate")
    p.add_argument("--init", metavar="FILE", help="start from this full-precision checkpoint's weights and vocabulary")
    p.add_argument("--distill", type=float, default=0.0, metavar="L",
                   help="loss (1-L) CE + L KL(--init model || this one) (default: %(default)s)")  # fmt: skip
    add_run_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    args.stage = "train"
    config = TrainConfig.find(args.config)
    overrides = {k: getattr(args, k) for k in ("epochs", "seed", "lr", "warmup") if getattr(args, k) is not None}
    config = replace(config, **overrides, dropout=config.dropout.scaled(args.dropout_scale))
    init = None if args.init is None else Checkpoint.load(args.init)
    if not 0 <= args.distill <= 1 or (args.distill and init is None):
        raise LowbitError(f"--distill {args.distill}: must lie in [0, 1], and needs --init, its teacher")
    corpora = Corpora.read(args.data, config, init.vocab if init else None)
    device, precision, parallel = prepare_run(args, config.seed)
    model_config = ModelConfig.from_dict(_model_fields(config, len(corpora.vocab)))
    if init and init.config != model_config:
        raise LowbitError(f"--init {args.init}: a model of another shape than --config {args.config} asks for")
    model = (init.build_model() if init else TransformerLM(model_config)).to(device)
    model.dropout = config.dropout
    torch.manual_seed(config.seed * 1000 + parallel.rank)  # dropout masks differ between processes
    teacher = use_tiles(init.build_model().to(device)) if args.distill else None
    run = Training(config, corpora, Stepper(model, parallel, device, precision, config.clip), args, teacher)
    result = run.run()
    if parallel.is_main:
        cli.console(args).print(
            f"{args.out}: {model_config.n_parameters():,} parameters, valid PPL {result['valid_ppl']:.2f} "
            f"after {result['steps']} steps in {cli.format_seconds(result['seconds'])}"
        )
    parallel.close()
    return result


def _model_fields(config: TrainConfig, vocab_size: int) -> dict[str, Any]:
    defaults = ModelConfig(vocab_size).to_dict()
    if unknown := sorted(set(config.model) - set(defaults)):
        raise LowbitError(f"training config: unknown model field {unknown[0]!r}; known: {', '.join(defaults)}")
    # Positions beyond those that training read are never learned: a longer context makes perplexity worse, not better.
    fields = defaults | {"max_len": config.seq_len} | config.model | {"vocab_size": vocab_size}
    return fields


class Training:
    """The loop of the full-precision stage."""

    def __init__(
        self, config: TrainConfig, corpora: Corpora, stepper: Stepper, args: argparse.Namespace,
        teacher: TransformerLM | None,
    ):  # fmt: skip
        self.config, self.corpora, self.stepper, self.args, self.teacher = config, corpora, stepper, args, teacher
        self.total = max(1, round(config.epochs * len(corpora.train.epoch(0))))
        self.optimizer = torch.optim.AdamW(
            _decay_groups(stepper.model, config.weight_decay),
            lr=config.lr,
            betas=(0.9, 0.98),
            eps=1e-8,
            fused=True,
        )
        identity = run_identity(stepper, corpora.digest) | {"config": config.to_dict(), "distill": args.distill}
        self.resume = Resume(args.out, identity, stepper.parallel, args.restart)
        self.step, self.seconds, self.peak = 0, 0.0, config.lr
        self.best_nll, self.best = math.inf, {}
        self.epochs = Epochs(corpora.train)

    def run(self) -> dict[str, Any]:
        """Train to the end, save the best model by validation, and return the summary."""
        self._restore()
        stepper, every = self.stepper, max(1, self.total // self.config.evals)
        stepper.model.train()
        started, nll, tokens = time.monotonic(), torch.zeros((), device=stepper.device), 0
        with self.resume.guarded(), cli.Progress("train", self.total, "step", self.step) as bar:
            while self.step < self.total:
                count, step_nll = self._update(next(self.epochs))
                nll, tokens = nll + step_nll * count, tokens + count
                self.step += 1
                if self.step % every == 0 or self.step == self.total:
                    self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
                    train_nll = stepper.parallel.sum(nll.item())[0] / tokens
                    self._validate(train_nll)
                    nll, tokens = torch.zeros_like(nll), 0
                bar.advance(note=ppl_note(self.best_nll))
                if self.resume.due():
                    self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
                    self.resume.save(self._state())
        return self._finish()

    def _update(self, batch) -> tuple[int, torch.Tensor]:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.peak, c.warmup, c.schedule)
        self.optimizer.zero_grad(set_to_none=True)
        result = self.stepper.backward(batch, self.teacher, self.args.distill)
        self.stepper.clip_gradients()
        self.optimizer.step()
        return result

    def _validate(self, train_nll: float) -> None:
        valid_nll = self.stepper.validate(self.corpora.valid)
        if not math.isfinite(valid_nll):
            raise LowbitError(f"training diverged at step {self.step} (loss is not finite): lower lr or raise warmup")
        self.resume.log(
            step=self.step, epoch=round(self.step * self.config.epochs / self.total, 3),
            train_ppl=math.exp(min(train_nll, 50)), valid_ppl=math.exp(min(valid_nll, 50)),
            lr=self.optimizer.param_groups[0]["lr"], seconds=round(self.seconds, 1),
        )  # fmt: skip
        if valid_nll < self.best_nll:
            self.best_nll = valid_nll
            self.best = {k: p.detach().cpu().clone() for k, p in self.stepper.model.named_parameters()}
        elif self.config.schedule == "plateau":
            self.peak *= PLATEAU_FACTOR

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.stepper.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "peak": self.peak, "best_nll": self.best_nll, "best": self.best,
            "epochs": self.epochs.state(),
        }  # fmt: skip

    def _restore(self) -> None:
        state = self.resume.load()
        if state is None:
            return
        self.stepper.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "peak", "best_nll", "best"):
            setattr(self, name, state[name])
        self.epochs = Epochs(self.corpora.train, **state["epochs"])
        if self.stepper.parallel.is_main:
            print(f"train: resuming at step {self.step} of {self.total}", file=sys.stderr)

    def _finish(self) -> dict[str, Any]:
        summary = {
            "stage": "train", "steps": self.total, "valid_ppl": math.exp(self.best_nll),
            "seconds": round(self.seconds, 1), "seed": self.config.seed, "precision": self.stepper.precision,
            "train_config": self.config.to_dict(),
        }  # fmt: skip
        if self.stepper.parallel.is_main:
            model = self.stepper.model
            model.load_state_dict(self.best, strict=False)
            Checkpoint.of_model(model, self.corpora.vocab, info=summary).save(self.args.out)
        self.resume.finish()
        return summary


def _decay_groups(model: TransformerLM, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; biases, norms and positions are free."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "pos.weight"]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
