"""A precision plan: which bits, table and scale group every matrix of a model gets (`plan.json`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.bitpack import row_bytes, ternary_row_bytes
from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json, write_json
from lowbit.quantize import check_group
from lowbit.tables import effective_bits, table_name

PLAN_VERSION = 1


@dataclass(frozen=True)
class MatrixPlan:
    """Precision of one matrix.

    Attributes:
        bits: 1, 2, 4 or 8.
        table: level table of :mod:`lowbit.tables`; the default of ``bits`` where None was given. "free" has packing
            learn the levels of the matrix after training (2 and 4 bits).
        group: weights that share a scale along K: None for a whole row, or a multiple of 64.
    """

    bits: int
    table: str | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", table_name(self.bits, self.table))
        check_group(self.group)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of codes and fp16 scales that an [n, k] matrix takes in a file."""
        row = ternary_row_bytes(k) if self.table == "ternary" else row_bytes(k, self.bits)
        return n * row + 2 * n * (-(-k // (self.group or k)))


class Plan(Mapping[str, MatrixPlan]):
    """Matrix name -> :class:`MatrixPlan`, immutable."""

    def __init__(self, matrices: Mapping[str, MatrixPlan], source: Mapping[str, Any] | None = None):
        self._matrices = dict(matrices)
        self.source = dict(source or {})

    def __getitem__(self, name: str) -> MatrixPlan:
        return self._matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    @classmethod
    def uniform(cls, config: ModelConfig, bits: int, table: str | None = None, group: int | None = None) -> Plan:
        """The same precision for every matrix."""
        entry = MatrixPlan(bits, table, group)
        return cls({name: entry for name in config.matrix_shapes()}, {"method": "uniform"})

    @classmethod
    def manual(cls, config: ModelConfig, rules: Sequence[tuple[str, int]]) -> Plan:
        """Bits by matrix name: the first shell pattern that matches decides.

        Raises:
            LowbitError: a matrix that no pattern matches.
        """
        matrices = {}
        for name in config.matrix_shapes():
            bits = next((b for pattern, b in rules if fnmatch.fnmatchcase(name, pattern)), None)
            if bits is None:
                raise LowbitError(f"manual plan: no pattern matches matrix {name!r}")
            matrices[name] = MatrixPlan(bits)
        return cls(matrices, {"method": "manual", "rules": [list(rule) for rule in rules]})

    def validate(self, config: ModelConfig, where: str = "plan") -> None:
        """Raises LowbitError unless the plan names exactly the matrices of ``config``."""
        known = config.matrix_shapes()
        if unknown := [name for name in self if name not in known]:
            raise LowbitError(
                f"{where}: unknown matrix {unknown[0]!r}; this model has {', '.join(list(known)[:8])} ..."
            )
        if missing := [name for name in known if name not in self]:
            raise LowbitError(f"{where}: no precision for matrix {missing[0]!r} ({len(missing)} missing)")

    def mean_bits(self, config: ModelConfig) -> float:
        """Bits of code per quantized weight (ternary counts 1.6), scales not included."""
        shapes = config.matrix_shapes()
        total = sum(n * k for n, k in shapes.values())
        bits = sum(n * k * effective_bits(self[m].bits, self[m].table) for m, (n, k) in shapes.items())
        return bits / total

    def to_dict(self) -> dict[str, Any]:
        matrices = {
            name: {"bits": p.bits, "table": p.table} | ({} if p.group is None else {"group": p.group})
            for name, p in self.items()
        }
        return {"version": PLAN_VERSION, "source": self.source, "matrices": matrices}

    @classmethod
    def from_dict(cls, values: Any, where: str = "plan") -> Plan:
        """Validating inverse of :meth:`to_dict`; ``where`` (a file name) heads every error."""
        if not isinstance(values, dict) or not isinstance(values.get("matrices"), dict):
            raise LowbitError(f"{where}: expected an object with 'matrices': {{name: {{'bits': b}}}}")
        if values.get("version", PLAN_VERSION) != PLAN_VERSION:
            raise LowbitError(f"{where}: plan version {values['version']!r}, this lowbit reads {PLAN_VERSION}")
        if not isinstance(values.get("source", {}), dict):
            raise LowbitError(f"{where}: 'source' must be an object")
        matrices = {}
        for name, entry in values["matrices"].items():
            if not isinstance(entry, dict) or "bits" not in entry or set(entry) - {"bits", "table", "group"}:
                raise LowbitError(f"{where}: matrix {name!r} needs 'bits' and takes 'table' and 'group' only")
            try:
                matrices[name] = MatrixPlan(entry["bits"], entry.get("table"), entry.get("group"))
            except LowbitError as error:
                raise LowbitError(f"{where}: matrix {name!r}: {error}") from None
        return cls(matrices, values.get("source"))

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        return cls.from_dict(read_json(path), str(path))

    def save(self, path: PathLike) -> None:
        write_json(path, self.to_dict())
