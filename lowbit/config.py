"""The shape of a Transformer LM: what a checkpoint, a plan and a packed file are checked against."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lowbit.errors import LowbitError

_CHOICES = {
    "norm": ("pre", "post"),
    "activation": ("relu", "gelu"),
    "position": ("sinusoidal", "learned", "rotary"),
}
# Ceilings that keep a hostile file from asking for unbounded memory; far above any model of this family.
_LIMITS = {
    "vocab_size": 2**24,
    "d_model": 65_536,
    "n_layers": 1_024,
    "n_heads": 1_024,
    "d_ffn": 2**20,
    "max_len": 2**20,
}


@dataclass(frozen=True)
class ModelConfig:
    """The paper's LM (arXiv 2112.11540, section 2) in all its variants.

    Attributes:
        max_len: longest context in tokens; longer texts are read with a sliding context.
        norm: LayerNorm before ("pre") or after ("post") each residual branch.
        tied: the output layer shares the embedding matrix.
    """

    vocab_size: int
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_ffn: int = 1024
    max_len: int = 128
    norm: str = "pre"
    activation: str = "gelu"
    position: str = "rotary"
    tied: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, ceiling in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= ceiling:
                raise LowbitError(f"model config: {name} must be an integer from 1 to {ceiling}, not {value!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise LowbitError(f"model config: {name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not isinstance(self.tied, bool):
            raise LowbitError(f"model config: tied must be true or false, not {self.tied!r}")
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise LowbitError(f"model config: norm_eps must lie between 0 and 1, not {self.norm_eps!r}")
        if self.d_model % self.n_heads:
            raise LowbitError(f"model config: d_model {self.d_model} is no multiple of n_heads {self.n_heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise LowbitError(f"model config: rotary positions need an even head size, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Quantizable matrices: name -> (N outputs, K inputs), in the order of the forward pass."""
        d, f = self.d_model, self.d_ffn
        shapes = {"embed": (self.vocab_size, d)}
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            shapes |= {f"{layer}.attn.{m}": (d, d) for m in "qkvo"}
            shapes |= {f"{layer}.mlp.fc1": (f, d), f"{layer}.mlp.fc2": (d, f)}
        if not self.tied:
            shapes["head"] = (self.vocab_size, d)
        return shapes

    def vector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every other tensor, which stays in floating point: biases, norms, learned positions."""
        d = self.d_model
        shapes: dict[str, tuple[int, ...]] = {}
        if self.position == "learned":
            shapes["pos.weight"] = (self.max_len, d)
        for name, (n, _) in self.matrix_shapes().items():
            if name.startswith("layers."):
                shapes[f"{name}.bias"] = (n,)
        norms = [f"layers.{i}.{n}" for i in range(self.n_layers) for n in ("norm1", "norm2")]
        for name in norms + (["norm"] if self.norm == "pre" else []):
            shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
        return shapes

    def n_parameters(self) -> int:
        """Trained numbers; a tied matrix counts once."""
        matrices = sum(n * k for n, k in self.matrix_shapes().values())
        vectors = 0
        for shape in self.vector_shapes().values():
            size = 1
            for dim in shape:
                size *= dim
            vectors += size
        return matrices + vectors

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ModelConfig:
        """Validating inverse of :meth:`to_dict`; unknown and missing fields are errors."""
        if not isinstance(values, dict):
            raise LowbitError(f"model config: expected an object, found {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LowbitError(f"model config: unknown field {unknown[0]!r}; known fields: {', '.join(sorted(known))}")
        if missing := sorted(known - set(values)):
            raise LowbitError(f"model config: field {missing[0]!r} is missing")
        return cls(**values)
