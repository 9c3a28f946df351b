"""The three phases of low-bit training as one resumable loop; see :mod:`lowbit.tools.admm`."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from lowbit.model import TransformerLM
from lowbit.plan import Plan
from lowbit.tools import cli
from lowbit.tools.training.admm_options import PHASES, AdmmOptions
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.loop import Epochs, Resume, Stepper, learning_rate, ppl_note, run_identity
from lowbit.tools.training.quantized import QuantizedMatrix

HARD_CHECKS = 40  # looks at the stability of codes over the hard phase
FREEZE_AFTER = 8  # looks a code must have been stable for
REFIT_EVERY = 10  # hard steps between re-solved scales
EVALS = {"admm": 6, "hard": 8, "scales": 3}  # validations of a phase that is long enough for them


class Admm:
    """Runs the phases; the model ends with level[code] * scale in every matrix, exactly."""

    def __init__(
        self,
        options: AdmmOptions,
        config: TrainConfig,
        plan: Plan,
        corpora: Any,
        stepper: Stepper,
        teacher: TransformerLM | None,
        out: str,
        restart: bool,
        pull: dict[str, float] | None = None,
    ):
        self.corpora, self.stepper, self.teacher = corpora, stepper, teacher
        parameters = dict(stepper.model.named_parameters())
        self.matrices = {name: QuantizedMatrix(parameters[f"{name}.weight"], plan[name]) for name in plan}
        self.pull = pull or dict.fromkeys(plan, 1.0)
        quantized = {f"{name}.weight" for name in plan}
        self.vectors = [p for name, p in parameters.items() if name not in quantized]
        total = max(3, round(options.epochs * len(corpora.train.epoch(0))))
        shares = [s / sum(options.phases) for s in options.phases]
        self.steps = dict(zip(PHASES, (round(total * s) for s in shares), strict=True))
        # One dual update a step at most: more would end the ramp of kappa before its last value.
        self.options = options = replace(options, duals=min(options.duals, max(1, self.steps["admm"])))
        # At most a tenth of a phase is spent on them: a forward pass is a third of a step.
        batches = sum(1 for _ in corpora.valid.evaluation())
        self.evals = {p: max(1, min(EVALS[p], round(0.3 * self.steps[p] / batches))) for p in PHASES}
        identity = run_identity(stepper, corpora.digest) | {
            "options": asdict(options), "config": config.to_dict(), "plan": plan.to_dict(),
            "pull": pull,
        }  # fmt: skip
        self.resume = Resume(out, identity, stepper.parallel, restart)
        self.phase, self.step, self.dual, self.seconds = "admm", 0, 0, 0.0
        self.valid_nll = self.best_nll = math.inf
        self.best: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.epochs = Epochs(corpora.train)

    def run(self) -> dict[str, Any]:
        """All phases; returns the summary."""
        state = self.resume.load()
        if state is None:
            self._start_phase("admm")
        else:
            self._restore(state)
        self.stepper.model.train()
        self._clock = time.monotonic()
        done = sum(self.steps[p] for p in PHASES[: PHASES.index(self.phase)]) + self.step
        with self.resume.guarded(), cli.Progress("admm", sum(self.steps.values()), "step", done) as self.bar:
            for phase in PHASES[PHASES.index(self.phase) :]:
                if self.steps[phase] == 0:
                    continue
                if phase != self.phase:
                    self._start_phase(phase)
                self._run_phase(getattr(self, f"_{phase}_step"))
        self._select()
        self._round_vectors()
        self.valid_nll = self.stepper.validate(self.corpora.valid)
        self._tick()
        return {
            "stage": "admm", "steps": self.steps, "valid_ppl": math.exp(self.valid_nll), "residual": self._residual(),
            "selected": self.best.get("at", "last step"),
            "seconds": round(self.seconds, 1), "options": asdict(self.options),
        }  # fmt: skip

    def finish(self) -> None:
        """Drop the resume file, once the result is safely written."""
        self.resume.finish()

    def scales(self) -> dict[str, torch.Tensor]:
        """Matrix name -> fp16 scales [N, G]."""
        return {name: m.scale.half() for name, m in self.matrices.items()}

    def _start_phase(self, phase: str) -> None:
        self.phase, self.step = phase, 0
        if phase == "admm":
            for m in self.matrices.values():
                m.set_target()
        elif phase == "hard":
            for m in self.matrices.values():
                m.start_hard(self.options.learn_scales)
        else:
            for m in self.matrices.values():
                m.start_scales()
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Weight decay is off: the levels, not zero, are where the weights belong (DESIGN 7)."""
        trained = {"admm": ["weight"], "hard": ["latent"], "scales": ["log_scale"]}[self.phase]
        if self.phase == "hard" and self.options.learn_scales:
            trained.append("log_scale")
        parameters = [getattr(m, name) for name in trained for m in self.matrices.values()] + self.vectors
        return torch.optim.AdamW(parameters, lr=self.options.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def _run_phase(self, step) -> None:
        while self.step < self.steps[self.phase]:
            step(next(self.epochs))
            self.step += 1
            self.bar.advance(note=", ".join(filter(None, (self.phase, ppl_note(self.valid_nll)))))
            if self.resume.due():
                self._tick()
                self.resume.save(self._state())

    def _set_lr(self) -> None:
        o, steps = self.options, self.steps[self.phase]
        peak = o.lr * o.lr_scales[PHASES.index(self.phase)]
        if self.phase == "admm":
            lr = learning_rate(self.step, steps, peak, o.warmup, "plateau")
        elif self.phase == "hard":
            lr = learning_rate(self.step, steps, peak, 0 if self.steps["admm"] else o.warmup)
        else:
            lr = learning_rate(self.step, steps, peak, min(o.warmup, steps // 5))
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _backward(self, batch) -> None:
        self.stepper.model.zero_grad(set_to_none=True)
        self.stepper.backward(batch, self.teacher, self.options.distill)
        self.stepper.clip_gradients()

    # Phase 1: ADMM

    def _admm_step(self, batch) -> None:
        self._set_lr()
        if self.options.extra_gradient:
            self._extrapolate(batch)
        self._backward(batch)
        if self.options.extra_gradient:
            torch._foreach_copy_(self._all_parameters(), self._origin)
        self.optimizer.step()
        kappa = self.options.kappa_at(self.dual)
        for name, m in self.matrices.items():
            m.weight.data.lerp_(m.target, min(1.0, kappa * self.pull[name]))
        duals = self.options.duals
        if self.step + 1 >= (self.dual + 1) * self.steps["admm"] / duals:
            self._dual_update()

    def _all_parameters(self) -> list[torch.Tensor]:
        return [p.data for p in self.stepper.model.parameters()]

    def _extrapolate(self, batch) -> None:
        """ExtraAdam (Gidel et al. 2019): look one step ahead, then step from here with the gradient seen there."""
        self._origin = [p.clone() for p in self._all_parameters()]
        self._backward(batch)
        self.optimizer.step()

    def _dual_update(self) -> None:
        flips, sizes = 0.0, 0
        kappa = self.options.kappa_at(self.dual)
        steps = self.steps["admm"] / self.options.duals
        for name, m in self.matrices.items():
            flips += m.q_step() * m.codes.numel()
            sizes += m.codes.numel()
            m.dual_step(1 - (1 - min(1.0, kappa * self.pull[name])) ** steps)
        # The scaled dual is U = y / rho: it shrinks as the penalty grows.
        ratio = kappa / self.options.kappa_at(min(self.dual + 1, self.options.duals - 1))
        residual = self._residual()
        record = {
            "dual": self.dual,
            "kappa": kappa,
            "residual": residual,
            "flips": flips / sizes,
        }
        self.dual += 1
        if self.dual % max(1, self.options.duals // self.evals["admm"]) == 0 or self.dual == self.options.duals:
            record |= self._ppl_of_both()
        self._log(**record)
        for m in self.matrices.values():
            m.dual *= ratio
            m.set_target()

    def _residual(self) -> float:
        parts = [m.squared_residual() for m in self.matrices.values()]
        return math.sqrt(sum(e for e, _ in parts) / sum(w for _, w in parts))

    def _ppl_of_both(self) -> dict[str, float]:
        """Validation perplexity of W and of Q; the model keeps W."""
        nll_w = self.stepper.validate(self.corpora.valid)
        with self._holding_q():
            self.valid_nll = self.stepper.validate(self.corpora.valid)
        if self.steps["hard"] + self.steps["scales"] == 0:
            self._remember()
        return {"valid_ppl_w": _ppl(nll_w), "valid_ppl_q": _ppl(self.valid_nll)}

    @contextlib.contextmanager
    def _holding_q(self) -> Iterator[None]:
        held = {name: m.weight.data.clone() for name, m in self.matrices.items()}
        for m in self.matrices.values():
            m.weight.data.copy_(m.quantized())
        yield
        for name, m in self.matrices.items():
            m.weight.data.copy_(held[name])

    # Phase 2: straight-through on the same quantizer

    def _hard_step(self, batch) -> None:
        self._set_lr()
        self._backward(batch)
        for m in self.matrices.values():
            m.pass_gradient(self.options.learn_scales)
        self.optimizer.step()
        steps = self.steps["hard"]
        look = (self.step + 1) * HARD_CHECKS // steps
        if look > self.step * HARD_CHECKS // steps:
            self._track_codes(look)
        for m in self.matrices.values():
            m.load_quantized(refit=(self.step + 1) % REFIT_EVERY == 0 and not self.options.learn_scales)
        self._validate()

    def _track_codes(self, look: int) -> None:
        sizes = sum(m.codes.numel() for m in self.matrices.values())
        flips = frozen = 0.0
        for m in self.matrices.values():
            f, z = m.track_codes(FREEZE_AFTER if look >= self.options.freeze_from * HARD_CHECKS else None)
            flips, frozen = flips + f * m.codes.numel() / sizes, frozen + z * m.codes.numel() / sizes
        self._log(look=look, flips=flips, frozen=frozen)

    # Phase 3: scales, biases and norms

    def _scales_step(self, batch) -> None:
        self._set_lr()
        self._backward(batch)
        for m in self.matrices.values():
            m.scale_gradient()
        self.optimizer.step()
        for m in self.matrices.values():
            m.load_scaled()
        self._validate()

    def _validate(self) -> None:
        """Validate Q where it is due."""
        steps, evals = self.steps[self.phase], self.evals[self.phase]
        if (self.step + 1) * evals // steps > self.step * evals // steps:
            self.valid_nll = self.stepper.validate(self.corpora.valid)
            self._log(valid_ppl_q=_ppl(self.valid_nll))
            self._remember()

    def _remember(self) -> None:
        """Keep the quantized model that was just validated, if it is the best so far."""
        if self.valid_nll < self.best_nll:
            self.best_nll = self.valid_nll
            self.best = {
                "at": f"{self.phase} step {self.step + 1}",
                "images": {name: list(m.image()) for name, m in self.matrices.items()},
                "vectors": [p.detach().cpu().clone() for p in self.vectors],
            }

    def _select(self) -> None:
        """End on the best quantized model by validation (DESIGN 7: select on Q); without one on the last Q."""
        if not self.best and self.phase == "admm":
            for m in self.matrices.values():
                m.adopt(m.codes, m.scale)
        if self.best:
            for name, m in self.matrices.items():
                m.adopt(*self.best["images"][name])
            for p, value in zip(self.vectors, self.best["vectors"], strict=True):
                p.data.copy_(value)

    def _round_vectors(self) -> None:
        """Biases, norms and positions as the packed file holds them (fp16)."""
        for p in self.vectors:
            p.data.copy_(p.data.half().float())

    # Log and resume

    def _log(self, **record: Any) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        seconds = self.seconds + time.monotonic() - self._clock
        self.resume.log(phase=self.phase, step=self.step + 1, lr=lr, seconds=round(seconds, 1), **record)

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _state(self) -> dict[str, Any]:
        return {
            "phase": self.phase, "step": self.step, "dual": self.dual, "seconds": self.seconds,
            "valid_nll": self.valid_nll, "best_nll": self.best_nll, "best": self.best,
            "model": self.stepper.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "epochs": self.epochs.state(),
            "matrices": {name: m.state() for name, m in self.matrices.items()},
        }  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("phase", "step", "dual", "seconds", "valid_nll", "best_nll", "best"):
            setattr(self, name, state[name])
        self.stepper.model.load_state_dict(state["model"])
        for name, m in self.matrices.items():
            m.restore(state["matrices"][name])
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs = Epochs(self.corpora.train, **state["epochs"])
        if self.stepper.parallel.is_main:
            print(
                f"admm: resuming in phase {self.phase} at step {self.step} of {self.steps[self.phase]}",
                file=sys.stderr,
            )


def _ppl(nll: float) -> float:
    return math.exp(min(nll, 50.0))
