"""The precisions that a search chooses from, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.plan import MatrixPlan, Plan
from lowbit.quantize import quantize

# Zero-free levels at 2 and 4 bits (DESIGN 3); ternary lies between 1 and 2 bits, at 1.6 in a file.
CHOICES = {
    "1": MatrixPlan(1),
    "ternary": MatrixPlan(2, "ternary"),
    "2": MatrixPlan(2),
    "4": MatrixPlan(4),
    "8": MatrixPlan(8),
}
_NAMES = {(entry.bits, entry.table): name for name, entry in CHOICES.items()}


def parse_choices(text: str) -> list[str]:
    """Names from "1,ternary,2"; at least one, known, none twice.

    Raises:
        LowbitError: otherwise.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CHOICES]:
        raise LowbitError(f"unknown precision {unknown[0]!r}; known: {', '.join(CHOICES)}")
    if not names or len(set(names)) < len(names):
        raise LowbitError(f"precisions {text!r}: name at least one, and none twice")
    return names


def choice_name(entry: MatrixPlan) -> str:
    """What a plan's entry is called here; its bits and table where it is none of ``CHOICES``."""
    return _NAMES.get((entry.bits, entry.table), f"{entry.bits} {entry.table}")


def make_plan(chosen: Mapping[str, str], source: dict[str, Any]) -> Plan:
    """The plan that gives every matrix its choice."""
    return Plan({matrix: CHOICES[name] for matrix, name in chosen.items()}, source)


def images(weight: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Q_b(W) fp32 [N, K], by least squares, for every choice b; on the weight's device."""
    return {
        name: quantize(weight, CHOICES[name].bits, CHOICES[name].table).dequantize().to(weight.device)
        for name in names
    }  # fmt: skip


def squared_errors(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """matrix -> choice -> ||Q_b(W) - W||^2."""
    return {
        matrix: {name: float((q - w).double().square().sum()) for name, q in images(w, names).items()}
        for matrix, w in weights.items()
    }


def matrix_parameters(model: torch.nn.Module, config: ModelConfig) -> dict[str, torch.nn.Parameter]:
    """Matrix name -> parameter [N, K]; a tied matrix stands once."""
    parameters = dict(model.named_parameters())
    return {name: parameters[f"{name}.weight"] for name in config.matrix_shapes()}
