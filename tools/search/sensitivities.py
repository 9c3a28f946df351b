"""The file of `lowbit sensitivity`, read and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json
from lowbit.tools.search.choices import CHOICES
from lowbit.tools.search.filesize import FileSize

SENSITIVITY_VERSION = 1


@dataclass(frozen=True)
class Sensitivities:
    """Costs of every matrix at every precision.

    Attributes:
        omega: matrix -> choice -> predicted increase of the loss, nats a token.
        squared_error: matrix -> choice -> ||Q(W) - W||^2.
    """

    metric: str
    choices: list[str]
    omega: dict[str, dict[str, float]]
    squared_error: dict[str, dict[str, float]]
    size: FileSize

    @classmethod
    def load(cls, path: PathLike) -> Sensitivities:
        """Raises LowbitError naming the matrix and the field unless the file is one of `lowbit sensitivity`."""
        values = read_json(path)
        if not isinstance(values, dict) or values.get("version") != SENSITIVITY_VERSION or "metric" not in values:
            raise LowbitError(f"{path}: not a file of `lowbit sensitivity` (version {SENSITIVITY_VERSION})")
        size = FileSize.from_dict(values.get("file"), str(path))
        choices = values.get("choices")
        if not isinstance(choices, list) or not choices or any(c not in CHOICES for c in choices):
            raise LowbitError(f"{path}: 'choices' must be a list of {', '.join(CHOICES)}")
        matrices, expected = values.get("matrices"), size.config.matrix_shapes()
        if not isinstance(matrices, dict) or set(matrices) != set(expected):
            raise LowbitError(f"{path}: 'matrices' must have exactly the {len(expected)} matrices of its model")
        tables = {
            field: {m: _numbers(matrices[m], field, choices, f"{path}: matrix {m!r}") for m in expected}
            for field in ("omega", "squared_error")
        }
        return cls(values["metric"], choices, tables["omega"], tables["squared_error"], size)


def pull_weights(path: PathLike, config: ModelConfig) -> dict[str, float]:
    """Factors on the proximal pull of every matrix: the root of its cost per squared error, geometric mean 1.

    Within [1/4, 4]: a sensitive matrix holds on to its quantized values sooner, none runs away from the others.

    Raises:
        LowbitError: a file of another model.
    """
    sens = Sensitivities.load(path)
    if sens.size.config != config:
        raise LowbitError(f"{path}: measured on a model of another shape")
    first = sens.choices[0]
    cost = [max(sens.omega[m][first], 1e-12) / max(sens.squared_error[m][first], 1e-12) for m in sens.omega]
    mean = sum(map(math.log, cost)) / len(cost)
    return {m: min(4.0, max(0.25, math.exp((math.log(c) - mean) / 2))) for m, c in zip(sens.omega, cost)}


def _numbers(row: Any, field: str, choices: list[str], where: str) -> dict[str, float]:
    found = row.get(field) if isinstance(row, dict) else None
    if not isinstance(found, dict):
        raise LowbitError(f"{where}: {field!r} must be an object")
    for choice in choices:
        value = found.get(choice)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise LowbitError(f"{where}: {field} of {choice!r} must be a finite number, not {value!r}")
    return {choice: float(found[choice]) for choice in choices}
