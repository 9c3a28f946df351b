"""What a table is made of: the JSON files of ``tools/configs/tables``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json
from lowbit.tools.search.choices import parse_choices

_FOLDER = Path(__file__).parent.parent / "configs" / "tables"
LONG_ROWS = ("fp32-again", "fp32-distilled", "uniform-2", "best")


@dataclass(frozen=True)
class TableConfig:
    """Rows and their training, the same for all that are compared.

    Attributes:
        train: the training configuration of the full-precision model.
        seeds: of the headline rows; every other row has the first.
        ratio: compression of all searched plans; budgets: further ones, of the Hessian's plan.
        uniform: precisions of the uniform plans; manual: rules of `lowbit allocate --manual`.
        epochs, lr, dropout_scale, distill: of every training from the full-precision model, quantized or not.
        admm: further options of the rows trained by ADMM.
        hessian, kl, nas: further options of these stages; the supernet has the learning rate ``lr`` or its own.
        trials: title -> other options of `lowbit admm` for the Hessian's plan, compared on validation text alone.
        long: headline rows trained again for longer, each ``{"epochs": E, "rows": [...]}``, rows of ``LONG_ROWS``; with
            ``"options": {title: [...]}``, what they are trained with besides, or instead; with ``"seeds": [...]``,
            which of them have all seeds too.
        seconds_per_step: measured, for the estimate of --dry-run; None where it was not.
    """

    train: str
    seeds: list[int]
    ratio: float
    epochs: float
    lr: float
    budgets: list[float] = field(default_factory=list)
    uniform: list[str] = field(default_factory=lambda: ["1", "ternary", "2", "4", "8"])
    manual: str = "*=2"
    randoms: int = 5
    dropout_scale: float = 0.7
    distill: float = 0.0
    admm: list[str] = field(default_factory=list)
    hessian: list[str] = field(default_factory=list)
    kl: list[str] = field(default_factory=list)
    nas: list[str] = field(default_factory=list)
    trials: dict[str, list[str]] = field(default_factory=dict)
    long: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_step: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise LowbitError("seeds: at least one, none twice")
        parse_choices(",".join(self.uniform))
        if "2" not in self.uniform:
            raise LowbitError("uniform: needs the precision 2, which the searched plans are compared with")
        if any(isinstance(options, str) for options in self.trials.values()):
            raise LowbitError("trials: options are lists of words")
        for long in self.long:
            if set(long) - {"options", "seeds"} != {"epochs", "rows"} or len(long.get("options", {"": []})) != 1:
                raise LowbitError("long: needs epochs, rows, and perhaps seeds, and options under one title")
            for key, known in (("rows", LONG_ROWS), ("seeds", long["rows"])):
                if unknown := [row for row in long.get(key, ()) if row not in known]:
                    raise LowbitError(f"long: {key}: unknown row {unknown[0]!r}; known: {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def find(cls, name_or_file: PathLike) -> TableConfig:
        """A named table, or a JSON file.

        Raises:
            LowbitError: neither, or an unknown or missing field; the file is named.
        """
        path = tables().get(str(name_or_file), Path(name_or_file))
        values = read_json(path)
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            what = f"unknown field {unknown[0]!r}" if isinstance(values, dict) else "not an object"
            raise LowbitError(f"{path}: {what}; fields: {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except (TypeError, LowbitError) as error:
            raise LowbitError(f"{path}: {error}") from None


def tables() -> dict[str, Path]:
    """Named tables and their files."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.json"))}
