"""Training configurations: the JSON files of ``tools/configs``, or a file of the same fields."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_json
from lowbit.model import Dropout

_FOLDER = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class TrainConfig:
    """How a full-precision model is trained.

    Attributes:
        model: fields of :class:`lowbit.config.ModelConfig` but the vocabulary size; the context (``max_len``) is
            ``seq_len`` unless given.
        mode: "stream" reads the corpus as one text, "sentence" reads every line by itself (for N-best rescoring).
        min_count, max_vocab: which words enter the vocabulary.
        rare_to_unk: rate at which a word seen once is read as ``<unk>``, where the text marks none itself.
        batch_size: pieces of ``seq_len`` tokens in a step, over all processes.
        schedule: "cosine" to 0 over all steps, or "plateau": a quarter whenever a validation does not improve.
        warmup: steps of linear warm-up.
        evals: validations over the whole run; the best model by validation is kept.
    """

    model: dict[str, Any] = field(default_factory=dict)
    mode: str = "stream"
    min_count: int = 1
    max_vocab: int | None = None
    rare_to_unk: float = 0.0
    seq_len: int = 64
    batch_size: int = 32
    epochs: float = 10.0
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: Dropout = field(default_factory=Dropout)
    evals: int = 20
    seed: int = 1

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise LowbitError(f"training config: {what}")

        require(self.mode in ("stream", "sentence"), f"mode must be 'stream' or 'sentence', not {self.mode!r}")
        require(
            self.schedule in ("cosine", "plateau"),
            f"schedule must be 'cosine' or 'plateau', not {self.schedule!r}",
        )
        require(isinstance(self.model, dict), f"model must be an object, not {self.model!r}")
        for name, least in (
            ("seq_len", 1),
            ("batch_size", 1),
            ("evals", 1),
            ("min_count", 1),
            ("warmup", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            require(_is_number(value, int) and value >= least, f"{name} must be an integer >= {least}, not {value!r}")
        for name in ("epochs", "lr", "clip"):
            value = getattr(self, name)
            require(_is_number(value) and 0 < value < math.inf, f"{name} must be a positive number, not {value!r}")
        decay, largest = self.weight_decay, self.max_vocab
        require(_is_number(decay) and 0 <= decay < math.inf, f"weight_decay must be a number >= 0, not {decay!r}")
        require(largest is None or (_is_number(largest, int) and largest >= 2), f"max_vocab {largest!r} is less than 2")
        for name, rate in {**asdict(self.dropout), "rare_to_unk": self.rare_to_unk}.items():
            require(_is_number(rate) and 0 <= rate < 1, f"{name} must lie in [0, 1), not {rate!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> TrainConfig:
        if not isinstance(values, dict):
            raise LowbitError(f"{where}: a training config is a JSON object")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LowbitError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        values = dict(values)
        try:
            values["dropout"] = Dropout(**values.get("dropout", {}))
            return cls(**values)
        except (TypeError, LowbitError) as error:
            raise LowbitError(f"{where}: {error}") from None

    @classmethod
    def find(cls, name_or_file: PathLike) -> TrainConfig:
        """A named configuration, or a JSON file."""
        return cls.from_dict(read_json(config_file(name_or_file)), str(name_or_file))


def config_file(name_or_file: PathLike) -> Path:
    """The JSON file of a named configuration, or the file itself.

    Raises:
        LowbitError: neither.
    """
    named = {p.stem: p for p in _FOLDER.glob("*.json")}
    path = named.get(str(name_or_file), Path(name_or_file))
    if not path.is_file():
        names = ", ".join(sorted(named))
        raise LowbitError(f"{name_or_file}: no such training config; named ones: {names}, or a JSON file")
    return path


def _is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
