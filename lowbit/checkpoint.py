"""Training's files: a full-precision or ADMM checkpoint, one safetensors file with its configuration inside.

The state that only resuming needs (optimiser, random generators) lives in another file beside it, so that the bytes of
a checkpoint are those of its model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lowbit.config import ModelConfig
from lowbit.errors import FormatError, LowbitError
from lowbit.files import PathLike, atomic_path
from lowbit.model import TransformerLM
from lowbit.plan import Plan
from lowbit.tables import FREE
from lowbit.vocab import Vocab

METADATA_KEY = "lowbit-checkpoint"
CHECKPOINT_VERSION = 1


@dataclass
class Checkpoint:
    """A trained model.

    Attributes:
        tensors: name -> fp32 tensor, exactly those of ``config``.
        plan: precision of every matrix, for an ADMM checkpoint.
        scales: matrix name -> fp16 [N, G], for an ADMM checkpoint.
        residual: ||W - Q|| / ||W|| over all matrices, for an ADMM checkpoint; 0 exactly where every weight is a level
            times its scale, so that packing loses nothing.
        info: how it was made (training configuration, perplexities, seeds).
    """

    config: ModelConfig
    vocab: Vocab
    tensors: dict[str, torch.Tensor]
    plan: Plan | None = None
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    residual: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_model(cls, model: TransformerLM, vocab: Vocab, **fields: Any) -> Checkpoint:
        """Snapshot of a dense model; a tied matrix is stored once."""
        tensors = {name: p.detach().float().cpu().clone() for name, p in model.named_parameters()}
        return cls(model.config, vocab, tensors, **fields)

    def build_model(self) -> TransformerLM:
        """A dense fp32 model in evaluation mode with these weights."""
        model = TransformerLM(self.config)
        model.load_state_dict(self.tensors)
        return model.eval()

    def save(self, path: PathLike) -> None:
        """Write atomically."""
        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        tensors |= {f"{name}.scale": s.contiguous() for name, s in self.scales.items()}
        metadata = {
            "version": CHECKPOINT_VERSION,
            "config": self.config.to_dict(),
            "vocab": self.vocab.tokens,
            "plan": self.plan.to_dict() if self.plan else None,
            "residual": self.residual,
            "info": self.info,
        }
        data = save(tensors, {METADATA_KEY: json.dumps(metadata)})
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @property
    def fp32_nbytes(self) -> int:
        """File bytes of the plain fp32 checkpoint of this model: the numerator of every compression ratio."""
        plain = {"version": CHECKPOINT_VERSION, "config": self.config.to_dict(), "vocab": self.vocab.tokens}
        header, offset = {"__metadata__": {METADATA_KEY: json.dumps(plain)}}, 0
        for name, tensor in self.tensors.items():
            end = offset + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        return 8 + len(json.dumps(header, separators=(",", ":"))) + offset

    @classmethod
    def load(cls, path: PathLike) -> Checkpoint:
        """Read and check a checkpoint.

        Raises:
            LowbitError: no such file.
            FormatError: not a checkpoint, or tensors that do not fit its configuration.
        """
        if not Path(path).is_file():
            raise LowbitError(f"{path}: no such checkpoint file")
        try:
            with safe_open(str(path), framework="pt") as stream:
                found = stream.metadata() or {}
                if METADATA_KEY not in found:
                    hint = "; it is a packed model, whose name ends in .lowbit" if "lowbit" in found else ""
                    raise FormatError(f"{path}: not a lowbit checkpoint (no {METADATA_KEY!r} metadata){hint}")
                raw = found[METADATA_KEY]
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a safetensors file: {error}") from None
        try:
            return cls._from_parts(tensors, json.loads(raw))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        except (LowbitError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: damaged metadata: {error}") from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Checkpoint:
        if metadata.get("version") != CHECKPOINT_VERSION:
            raise FormatError(f"checkpoint version {metadata.get('version')!r}, this lowbit reads {CHECKPOINT_VERSION}")
        config, vocab = ModelConfig.from_dict(metadata["config"]), Vocab(metadata["vocab"])
        if len(vocab) != config.vocab_size:
            raise FormatError(f"{len(vocab)} words of vocabulary, the model has {config.vocab_size}")
        plan = Plan.from_dict(metadata["plan"]) if metadata["plan"] else None
        expected = {f"{m}.weight": shape for m, shape in config.matrix_shapes().items()} | config.vector_shapes()
        scales = {m: tensors.pop(f"{m}.scale") for m in (plan or {}) if f"{m}.scale" in tensors}
        for name, shape in expected.items():
            if name not in tensors:
                raise FormatError(f"tensor {name!r} is missing")
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float32:
                found = f"{list(tensors[name].shape)} {tensors[name].dtype}"
                raise FormatError(f"tensor {name!r} is {found}, the configuration asks for {list(shape)} float32")
            if not bool(torch.isfinite(tensors[name]).all()):
                raise FormatError(f"tensor {name!r} holds NaN or infinite values")
        if unknown := sorted(set(tensors) - set(expected)):
            raise FormatError(f"tensor {unknown[0]!r} does not belong to this configuration")
        if plan:
            plan.validate(config)
            _check_scales(config, plan, scales)
        residual, info = metadata["residual"], metadata["info"]
        if residual is not None and (type(residual) not in (int, float) or not residual >= 0):
            raise FormatError(f"residual must be a number from 0 or null, not {residual!r}")
        if not isinstance(info, dict):
            raise FormatError(f"info must be an object, not {type(info).__name__}")
        ordered = {name: tensors[name] for name in expected}
        return cls(config, vocab, ordered, plan, scales, residual, info)


def _check_scales(config: ModelConfig, plan: Plan, scales: dict[str, torch.Tensor]) -> None:
    for name, (n, k) in config.matrix_shapes().items():
        shape = (n, -(-k // (plan[name].group or k)))
        scale = scales.get(name)
        if plan[name].table == FREE:
            raise FormatError(f"matrix {name!r}: no training ends on free levels")
        if scale is None or tuple(scale.shape) != shape or scale.dtype != torch.float16:
            raise FormatError(f"tensor '{name}.scale' is missing or not float16 {list(shape)}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise FormatError(f"tensor '{name}.scale' holds a value that is not finite and positive")
