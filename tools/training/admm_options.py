"""Length and strength of low-bit training's phases."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.errors import LowbitError

PHASES = ("admm", "hard", "scales")
# Shares of the steps; "admm-only" ends on the last Q step's projection, as the papers do.
METHODS = {
    "admm": (0.4, 0.5, 0.1),
    "straight-through": (0.0, 0.9, 0.1),
    "admm-only": (1.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class AdmmOptions:
    """Defaults as DESIGN section 7.

    Attributes:
        phases: shares of the steps for ADMM, the hard phase and the scale phase.
        lr_scales: factors on ``lr`` in these phases.
        kappa: first and last strength of the decoupled proximal pull W <- W - kappa (W - Q + U), ramped
            geometrically.
        learn_scales: the hard phase learns scales by gradient (Esser et al. 2020), instead of fitting them.
        freeze_from: share of the hard phase after which stable codes are frozen; 1 or more never freezes.
    """

    epochs: float = 10.0
    lr: float = 5e-4
    phases: tuple[float, float, float] = METHODS["admm"]
    lr_scales: tuple[float, float, float] = (1.0, 1.0, 0.25)
    dropout_scale: float = 0.7
    distill: float = 0.0
    duals: int = 40
    kappa: tuple[float, float] = (1e-5, 1e-2)
    extra_gradient: bool = False
    learn_scales: bool = False
    freeze_from: float = 0.7
    warmup: int = 100

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise LowbitError(f"admm: {what}")

        require(0 < self.epochs < math.inf and 0 < self.lr < math.inf, "epochs and lr must be positive numbers")
        require(min(self.phases) >= 0 and 0 < sum(self.phases) < math.inf, "phases are shares that are not all 0")
        require(min(self.lr_scales) > 0 and max(self.lr_scales) < math.inf, "lr-scales must be positive numbers")
        require(0 <= self.distill <= 1, "distill must lie in [0, 1]")
        require(self.dropout_scale >= 0 and self.duals >= 1, "dropout-scale must be >= 0 and duals >= 1")
        require(0 < self.kappa[0] <= self.kappa[1] < 1, "kappa must rise within (0, 1)")
        require(self.freeze_from > 0, "freeze-from must be positive")

    def kappa_at(self, dual: int) -> float:
        first, last = self.kappa
        return first * (last / first) ** (dual / max(1, self.duals - 1))
