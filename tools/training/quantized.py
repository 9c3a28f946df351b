"""The quantized side of ADMM training: codes, scales and duals of every matrix (DESIGN section 7).

One :class:`QuantizedMatrix` per matrix of the plan walks through three phases. While ADMM runs, the model holds the
free weights W and this class holds Q and the scaled dual U. In the hard phase the model holds Q(latent) and gradients
pass straight through to the latent. In the scale phase the codes are fixed and only scales move.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.plan import MatrixPlan
from lowbit.quantize import fit, nearest_codes, round_scale
from lowbit.tables import find_table
from lowbit.tools.training import native

_BLOCK = 1 << 18  # weights quantized at a time, so that the passes of one block stay in cache
_REFINE = 2  # alternations of a warm-started fit in the hard phase


class QuantizedMatrix:
    """A matrix parameter [N, K] of a model and its quantized image.

    Attributes:
        weight: the model's parameter; W while ADMM runs, Q afterwards.
        codes: uint8 [N, K]; scale: fp32 [N, G] holding fp16 values.
        dual: U, fp32 [N, K], while ADMM runs.
        latent: the hard phase's full-precision weights, a parameter of its optimiser.
        frozen: codes that no longer move, bool [N, K].
        log_scale: ln(scale / scale at the phase's start), fp32 [N, G]: the scale phase's parameter, and the hard
            phase's where that learns scales.
    """

    def __init__(self, weight: torch.nn.Parameter, plan: MatrixPlan):
        self.weight, self.plan = weight, plan
        self.table = find_table(plan.bits, plan.table)
        self.levels = torch.tensor(self.table.padded, dtype=torch.int8, device=weight.device)
        self.group = plan.group or weight.shape[1]
        self.quantizer = native.Quantizer(self.table, self.group)
        self.dual = torch.zeros_like(weight.data)
        self.codes, self.scale = self._fit(weight.data, None)
        self.latent: torch.nn.Parameter | None = None
        self.log_scale: torch.nn.Parameter | None = None
        self.stable = self.frozen = self._previous = None

    def _fit(self, v: torch.Tensor, start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = fit(v, self.table, self.plan.group, start=start, iterations=12 if start is None else 4)
        return codes, scale.float()

    def column_scale(self) -> torch.Tensor:
        """Scales broadcast over K: [N, 1] or [N, K]."""
        if self.scale.shape[1] == 1:
            return self.scale
        return self.scale.repeat_interleave(self.group, dim=1)[:, : self.weight.shape[1]]

    def quantized(self) -> torch.Tensor:
        """Q = level[code] * scale, fp32 [N, K]."""
        return self.levels[self.codes.int()] * self.column_scale()

    # ADMM phase

    def set_target(self) -> None:
        """Where the proximal pull leads until the next dual update: Q - U."""
        self.target = self.quantized() - self.dual

    def q_step(self) -> float:
        """Q <- the nearest quantized matrix to W + U. Returns the share of codes that changed."""
        before = self.codes
        self.codes, self.scale = self._fit(self.weight.data + self.dual, self.scale)
        return (before != self.codes).float().mean().item()

    def dual_step(self, rate: float) -> None:
        """U <- U + rate (W - Q), with ||U|| at most ||W||.

        ``rate`` is the share of the way to its target that the pull can have led W since the last update. Plain ADMM
        has rate 1; under a weak pull W cannot answer, and U winds up (in a short run nearly half of all codes flipped
        at every update).
        """
        self.dual.add_(self.weight.data - self.quantized(), alpha=rate)
        limit, size = self.weight.data.norm(), self.dual.norm()
        if size > limit:
            self.dual *= limit / size

    def squared_residual(self) -> tuple[float, float]:
        """(||W - Q||^2, ||W||^2)."""
        w = self.weight.data
        return (w - self.quantized()).square().sum().item(), w.square().sum().item()

    # Hard phase

    def start_hard(self, learn_scales: bool = False) -> None:
        """From here on the model computes with Q, and the latent starts at the free weights."""
        self.latent = torch.nn.Parameter(self.weight.data.clone())
        self.stable = torch.zeros_like(self.codes)
        self.frozen = torch.zeros_like(self.codes, dtype=torch.bool)
        self._previous = self.codes
        self.dual = self.target = None
        self.load_quantized(refit=True)
        if learn_scales:
            self.first_scale = self.scale.clone()
            self.log_scale = torch.nn.Parameter(torch.zeros_like(self.scale))

    def load_quantized(self, refit: bool) -> None:
        """weight <- Q(latent); ``refit`` re-solves the scales for the moved latent first, until codes are frozen.

        Frozen latents rest on their levels and have no pull of their own: a scale re-fitted among them follows the few
        latents that still wander near a boundary between levels, the frozen ones follow the scale, and every scale
        shrinks, by up to a fifth. From the first frozen code on scales wait for the scale phase.
        """
        latent = self.latent.data
        if refit and not self._any_frozen:
            self.scale = self._refit(latent)
        if self.log_scale is not None and not self._any_frozen:
            self.scale = round_scale(self.first_scale * self.log_scale.data.exp())
        if native.suits(latent, self.weight.data, self.scale):
            self.quantizer.load(latent, self.scale, self.weight.data)
            return
        if self.table.affine is None:
            self.weight.data.copy_(self.levels[self._nearest().int()] * self.column_scale())
            return
        # level = a * round((v / s - b) / a) + b in four passes over a block that stays in cache.
        a, b = self.table.affine
        bottom, top = (1, 255) if self.table.name == "int8" else (0, len(self.table.levels) - 1)
        step = self.column_scale() * a
        inverse, offset = 1 / step, -b / a
        rows = max(1, _BLOCK // latent.shape[1])
        for i in range(0, len(latent), rows):
            block = slice(i, i + rows)
            out = self.weight.data[block]
            torch.mul(latent[block], inverse[block], out=out)
            out.add_(offset).round_().clamp_(bottom, top).add_(b / a).mul_(step[block])

    def _refit(self, latent: torch.Tensor) -> torch.Tensor:
        closed_form = self.table.name in ("binary", "ternary")
        if not closed_form and native.suits(latent, self.scale):
            return self.quantizer.refine(latent, self.scale, _REFINE)
        options = {"start": self.scale, "refine_only": True, "iterations": _REFINE}
        return fit(latent, self.table, self.plan.group, **options)[1].float()

    def _nearest(self) -> torch.Tensor:
        return nearest_codes(self.latent.data / self.column_scale(), self.table)

    def pass_gradient(self, learn_scales: bool = False) -> None:
        """Straight through: the gradient at Q becomes the latent's, frozen codes aside.

        With ``learn_scales`` scales get theirs too, until codes are frozen: d Q / d ln s = Q - W where W lies in the
        range of the levels, and Q beyond it (Esser et al. 2020, equation 3).
        """
        grad = self.weight.grad
        if learn_scales:
            self.log_scale.grad = None if self._any_frozen else self._learned_scale_gradient(grad)
        self.latent.grad = grad.masked_fill_(self.frozen, 0) if self._any_frozen else grad

    def _learned_scale_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        levels = self.table.levels
        # The outermost levels round what lies up to half a step beyond them.
        low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
        columns, w, q = self.column_scale(), self.latent.data, self.weight.data
        inside = (w >= low * columns) & (w <= high * columns)
        return self._by_scale(grad * torch.where(inside, q - w, q))

    def _by_scale(self, product: torch.Tensor) -> torch.Tensor:
        """Sums of [N, K] over the weights that share a scale, [N, G]."""
        padded = torch.nn.functional.pad(product, (0, -product.shape[1] % self.group))
        return padded.view(len(product), -1, self.group).sum(2)

    _any_frozen = False

    def track_codes(self, freeze_after: int | None) -> tuple[float, float]:
        """Count how long every code has been stable; freeze those stable for ``freeze_after`` calls.

        Returns:
            share of codes changed since the last call, share frozen.
        """
        codes = self._nearest()
        changed = codes != self._previous
        self.stable = torch.where(changed, 0, self.stable + (self.stable < 255))
        self._previous = codes
        if freeze_after is not None:
            self.frozen |= self.stable >= freeze_after
            # A frozen latent rests on its level, so that a moving scale cannot flip it.
            on_level = self.levels[codes.int()] * self.column_scale()
            self.latent.data = torch.where(self.frozen, on_level, self.latent.data)
            self._any_frozen = True
        return changed.float().mean().item(), self.frozen.float().mean().item()

    def image(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the codes and scales that the model computes with now."""
        codes = self.codes if self.latent is None else self._nearest()
        return codes.clone(), self.scale.clone()

    def adopt(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """End training on an earlier :meth:`image`."""
        self.codes, self.scale = codes.to(self.weight.device), scale.to(self.weight.device)
        self.latent = self.log_scale = None
        self.weight.data.copy_(self.quantized())

    # Scale phase

    def start_scales(self) -> None:
        """Fix the codes; from here on only the scales (and the model's vectors) move."""
        if self.latent is not None:
            self.codes = self._nearest()
        self.first_scale = self.scale.clone()
        self.log_scale = torch.nn.Parameter(torch.zeros_like(self.scale))
        self.latent = self.stable = self.frozen = self._previous = None
        self.load_scaled()

    def load_scaled(self) -> None:
        """weight <- level[code] * scale at the current scales."""
        self.scale = round_scale(self.first_scale * self.log_scale.data.exp())
        torch.mul(self.levels[self.codes.int()], self.column_scale(), out=self.weight.data)

    def scale_gradient(self) -> None:
        """d loss / d ln(scale) = sum over the group of gradient * weight."""
        self.log_scale.grad = self._by_scale(self.weight.grad * self.weight.data)

    # Resume

    _STATE = ("codes", "scale", "dual", "target", "stable", "frozen", "_previous", "first_scale")

    def state(self) -> dict[str, Any]:
        out = {name: getattr(self, name, None) for name in self._STATE}
        out |= {name: p.data for name in ("latent", "log_scale") if (p := getattr(self, name)) is not None}
        return out | {"any_frozen": self._any_frozen}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            value = state[name]
            setattr(self, name, None if value is None else value.to(self.weight.device))
        for name in ("latent", "log_scale"):
            setattr(self, name, torch.nn.Parameter(state[name].to(self.weight.device)) if name in state else None)
        self._any_frozen = state["any_frozen"]
