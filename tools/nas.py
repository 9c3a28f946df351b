"""Search a precision plan by differentiable architecture search: fp.safetensors -> plan.json (DESIGN section 7)."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.files import write_json
from lowbit.tools import cli
from lowbit.tools.search.budget import Allocation, Budget
from lowbit.tools.search.choices import CHOICES, choice_name, make_plan, matrix_parameters, parse_choices
from lowbit.tools.search.filesize import FileSize
from lowbit.tools.search.start import load_full_precision, split_training_text
from lowbit.tools.search.supernet import Mixture, Sampler, SizeTerm, log_probabilities
from lowbit.tools.training.data import Batches
from lowbit.tools.training.loop import Epochs, Resume, Stepper, learning_rate, run_identity
from lowbit.tools.training.start import add_run_options, prepare_run

REFRESH_EVERY = 8  # weight steps between quantizing the latents anew
RECORDS = 50  # of the trajectory


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "nas",
        "lowbit nas fp.safetensors --data data/ptb --ratio 16 --out plan.json",
        "Weights and precisions are trained together, precisions on a part of the training text that weights do not\n"
        "see meanwhile; the validation text is never read. The plan is the exact allocation of the most probable\n"
        "precisions under the budget; train it with `lowbit admm` from the full-precision checkpoint. An interrupted\n"
        "run goes on when the same command is given again.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a full-precision checkpoint of `lowbit train`")
    p.add_argument("--data", required=True, metavar="DIR", help="the text that the checkpoint was trained on")
    p.add_argument("--ratio", required=True, type=float, metavar="R", help="compression: R times smaller, or more")
    p.add_argument(
        "--out", required=True, metavar="FILE", help="plan to write (JSON), with probabilities and trajectory"
    )
    p.add_argument("--choices", default=",".join(CHOICES), metavar="LIST", help="precisions (default: %(default)s)")
    p.add_argument("--epochs", type=float, default=3.0, help="of weight steps (default: %(default)s)")
    p.add_argument("--lr", type=float, help="peak learning rate of the weights (default: half of the original's)")
    p.add_argument("--alpha-lr", type=float, default=0.05, help="of the precisions (default: %(default)s)")
    p.add_argument("--alpha-every", type=int, default=2, metavar="N",
                   help="weight steps between steps of the precisions (default: %(default)s)")  # fmt: skip
    p.add_argument("--held-out", type=float, default=0.1, metavar="SHARE",
                   help="of the training text, for the precisions (default: %(default)s)")  # fmt: skip
    p.add_argument("--temperature", type=float, nargs=2, default=(5.0, 0.3), metavar=("FIRST", "LAST"),
                   help="of the softmax (default: %(default)s)")  # fmt: skip
    p.add_argument("--delta", type=float, default=1.0, help="quadratic weight of the size term (default: %(default)s)")
    p.add_argument("--mu-rate", type=float, default=0.05, help="step of the size multiplier (default: %(default)s)")
    p.add_argument("--dropout-scale", type=float, default=0.7, help="factor on dropout rates (default: %(default)s)")
    p.add_argument("--seed", type=int, help="order of the data, dropout and noise (default: the original's)")
    add_run_options(p)
    return p


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("ratio", "epochs", "alpha_lr", "mu_rate"):
        if not 0 < getattr(args, name) < math.inf:
            raise LowbitError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(args, name)}")
    if not 0 < args.held_out < 1:
        raise LowbitError(f"--held-out must lie between 0 and 1, not {args.held_out}")
    if args.alpha_every < 1 or args.delta < 0:
        raise LowbitError("--alpha-every must be at least 1 and --delta at least 0")


class Search:
    """Alternating steps of weights and precisions.

    Args:
        texts: for the weights and for the precisions.
    """

    def __init__(
        self, args: argparse.Namespace, stepper: Stepper, texts: tuple[Batches, Batches], budget: Budget,
        choices: Sequence[str], lr: float, seed: int,
    ):  # fmt: skip
        self.args, self.stepper, self.texts, self.lr = args, stepper, texts, lr
        weights = matrix_parameters(stepper.model, budget.size.config)
        self.mixtures = {name: Mixture(w, choices) for name, w in weights.items()}
        chosen = {id(w) for w in weights.values()}
        self.vectors = [p for p in stepper.model.parameters() if id(p) not in chosen]
        self.alpha = torch.nn.Parameter(torch.zeros(len(weights), len(choices)))
        self.sampler = Sampler(self.alpha, tuple(args.temperature), seed)
        nbytes, capacity = budget.problem(choices)
        rest = budget.nbytes - capacity
        self.size = SizeTerm(torch.tensor(nbytes, dtype=torch.float64), rest, budget.nbytes, args.delta)
        trained = [*(m.latent for m in self.mixtures.values()), *self.vectors]
        self.optimizers = {
            "weights": torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            "alpha": torch.optim.Adam([self.alpha], lr=args.alpha_lr, betas=(0.5, 0.999)),
        }
        self.total = max(REFRESH_EVERY, round(args.epochs * len(texts[0].epoch(0))))
        self.step, self.mu, self.records = 0, 0.0, []
        self.epochs = [Epochs(text) for text in texts]

    def run(self, resume: Resume) -> None:
        state = resume.load()
        if state is not None:
            self._restore(state)
        with resume.guarded(), cli.Progress("nas", self.total, "step", self.step) as bar:
            while self.step < self.total:
                self._weight_step()
                if (self.step + 1) % self.args.alpha_every == 0:
                    self._alpha_step()
                self.step += 1
                bar.advance(note=self._note())
                if self.step % REFRESH_EVERY == 0:
                    for m in self.mixtures.values():
                        m.refresh()
                    # Only here are the images what the saved latents and scales give again.
                    if resume.due():
                        resume.save(self._state())

    def probabilities(self) -> torch.Tensor:
        return self.alpha.detach().double().softmax(-1)

    def _note(self) -> str:
        return f"size {1 + float(self.size.excess(self.probabilities())):.3f} of the budget"

    def _sampled_backward(self, epochs: Epochs) -> tuple[torch.Tensor, float]:
        """Gradients of a batch at freshly drawn precisions; returns (soft pi [M, C], mean NLL)."""
        hard, soft = self.sampler.draw(self.step / self.total)
        for m, pi in zip(self.mixtures.values(), hard):
            m.load(pi)
        self.stepper.model.zero_grad(set_to_none=True)
        _, nll = self.stepper.backward(next(epochs))
        return soft, float(nll)

    def _weight_step(self) -> None:
        self.stepper.model.train()
        self._sampled_backward(self.epochs[0])
        self.stepper.clip_gradients()
        for m in self.mixtures.values():
            m.latent.grad = m.weight.grad
        for group in self.optimizers["weights"].param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.lr, min(100, self.total // 10))
        self.optimizers["weights"].step()

    def _alpha_step(self) -> None:
        self.stepper.model.eval()
        soft, nll = self._sampled_backward(self.epochs[1])
        pi_gradient = torch.stack([m.pi_gradient() for m in self.mixtures.values()])
        self.optimizers["alpha"].zero_grad()
        self.size.loss(self.alpha.double().softmax(-1), self.mu).backward()
        self.alpha.grad += self.sampler.alpha_gradient(soft, pi_gradient)
        self.optimizers["alpha"].step()
        p = self.probabilities()
        self.mu = self.size.raised(self.mu, p, self.args.mu_rate)
        if self.step * RECORDS // self.total > (self.step - self.args.alpha_every) * RECORDS // self.total:
            size = (1 + float(self.size.excess(p))) * self.size.budget
            self.records.append({
                "step": self.step + 1, "bytes": round(size), "mu": self.mu, "temperature": self.sampler.tau,
                "held_out_nll": self.stepper.parallel.sum(nll)[0],
                "entropy": float(-(p * p.clamp(min=1e-12).log()).sum(-1).mean()),
            })  # fmt: skip

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step, "mu": self.mu, "records": self.records, "alpha": self.alpha.data,
            "vectors": [p.data for p in self.vectors], "generator": self.sampler.generator.get_state(),
            "mixtures": {name: m.state() for name, m in self.mixtures.items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "epochs": [e.state() for e in self.epochs],
        }  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.mu, self.records = state["step"], state["mu"], state["records"]
        self.alpha.data.copy_(state["alpha"])
        self.sampler.generator.set_state(state["generator"])
        for p, value in zip(self.vectors, state["vectors"]):
            p.data.copy_(value)
        for name, m in self.mixtures.items():
            m.restore(state["mixtures"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.epochs = [Epochs(text, **at) for text, at in zip(self.texts, state["epochs"])]


def body(args: argparse.Namespace) -> dict[str, Any]:
    args.stage = "nas"
    check_arguments(args)
    choices = parse_choices(args.choices)
    checkpoint, config = load_full_precision(args.checkpoint)
    seed = config.seed if args.seed is None else args.seed
    config = replace(config, seed=seed, dropout=config.dropout.scaled(args.dropout_scale))
    lr = config.lr / 2 if args.lr is None else args.lr
    size = FileSize.of(checkpoint)
    budget = Budget.of_ratio(size, args.ratio)
    matrices = list(checkpoint.config.matrix_shapes())
    Allocation(budget, {m: dict.fromkeys(choices, 0.0) for m in matrices}, choices, {})  # refuses what cannot fit
    texts = split_training_text(args.data, config, checkpoint.vocab, args.held_out)
    device, precision, parallel = prepare_run(args, seed)
    model = checkpoint.build_model().to(device)
    model.dropout = config.dropout
    torch.manual_seed(seed * 1000 + parallel.rank)
    stepper = Stepper(model, parallel, device, precision, config.clip)
    identity = run_identity(stepper, "-".join(text.digest for text in texts))
    names = ("ratio", "epochs", "alpha_lr", "alpha_every", "held_out", "temperature", "delta", "mu_rate")
    identity |= {name: getattr(args, name) for name in names} | {"lr": lr, "choices": choices, "seed": seed}
    resume = Resume(args.out, identity, parallel, args.restart)
    search, started = Search(args, stepper, texts, budget, choices, lr, seed), time.monotonic()
    search.run(resume)
    result = conclude(args, search, budget, choices, matrices)
    result["seconds"] = round(time.monotonic() - started, 1)
    if parallel.is_main:
        plan = make_plan(result["matrices"], {"method": "nas"} | budget.describe())
        write_json(args.out, plan.to_dict() | {"search": cli.finite(result)})
        show(args, result)
    resume.finish()
    parallel.close()
    return result


def conclude(
    args: argparse.Namespace, search: Search, budget: Budget, choices: Sequence[str], matrices: Sequence[str]
) -> dict[str, Any]:
    """The exact allocation that maximises the sum of log pi, with all that led to it."""
    log_pi = log_probabilities(search.alpha, matrices, choices)
    costs = {m: {c: -v for c, v in row.items()} for m, row in log_pi.items()}
    found = Allocation(budget, costs, choices, {})
    nbytes = budget.size.nbytes(found.plan)
    return {
        "method": "nas", "bytes": nbytes, "ratio": budget.size.fp32_nbytes / nbytes,
        "mean_bits": found.plan.mean_bits(budget.size.config),
        "matrices": {m: choice_name(e) for m, e in found.plan.items()},
        "pi": {m: {c: math.exp(v) for c, v in row.items()} for m, row in log_pi.items()},
        **found.summary(), "trajectory": search.records, "steps": search.total, "held_out": args.held_out,
    }  # fmt: skip


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    console = cli.console(args)
    width = max(map(len, result["matrices"]))
    for name, choice in result["matrices"].items():
        shares = "  ".join(f"{c} {p:.2f}" for c, p in result["pi"][name].items())
        console.print(f"{name:{width}}  {choice:8} ({shares})")
    console.print(
        f"{args.out}: {result['bytes']:,} bytes packed, {result['ratio']:.3f} times smaller, "
        f"{result['mean_bits']:.3f} bits a weight, after {result['steps']} steps"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
