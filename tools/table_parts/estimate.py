"""What a table will cost: its stages, steps, memory and, where a step was timed, hours; nothing is run."""

from __future__ import annotations

from typing import Any

from lowbit.config import ModelConfig
from lowbit.tools.search.choices import CHOICES
from lowbit.tools.table_parts.config import TableConfig
from lowbit.tools.table_parts.rows import EQUAL_BYTES, first_rows, headline_rows, plans, trial_rows
from lowbit.tools.table_parts.run import model_name
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.start import Corpora

# Bytes a weight beside the weight itself: gradient and Adam's two moments, and the best model so far.
_TRAIN = 4 * 5
# ADMM: dual, target; hard phase: latent, previous codes, stable, frozen; both: codes of now and of the best model.
_ADMM = 4 * 6 + 5
_TEACHER = 4  # bytes a weight
_QUANTIZED, _DISTILLED = 1.35, 1.35  # time of a step, relative to plain training


def stages(data: str, config: TableConfig) -> dict[str, Any]:
    """Every stage in order, with steps; peak memory in bytes; hours, None where no step was timed."""
    train = TrainConfig.find(config.train)
    corpora = Corpora.read(data, train)
    epoch = len(corpora.train.epoch(0))
    fields = {"max_len": train.seq_len} | train.model | {"vocab_size": len(corpora.vocab)}
    model = ModelConfig(**fields)
    out: list[dict[str, Any]] = []
    seen = set()

    def add(key: str, stage: str, steps: float, weight: float = 1.0) -> None:
        if key not in seen:
            seen.add(key)
            seconds = None if config.seconds_per_step is None else steps * config.seconds_per_step * weight
            out.append({"key": key, "stage": stage, "steps": round(steps), "seconds": seconds})

    specs = first_rows(config)
    best = next(s for s in specs if s.key == "hessian")
    add(f"train-fp32-s{config.seeds[0]}", "train", train.epochs * epoch)
    for metric in ("hessian", "kl"):
        # A probe's double backward costs about eight bf16 training steps; a KL batch two forwards a matrix and choice.
        samples = _most(getattr(config, metric), 500)
        matrices = len(model.matrix_shapes())
        add(f"sensitivity-{metric}", "sensitivity", samples, 8 if metric == "hessian" else matrices * 0.4)
    for name in [*plans(config), EQUAL_BYTES]:
        add(f"allocate-{name}", "allocate", 0)
    add("nas", "nas", _value(config.nas, "--epochs", 3.0) * epoch, 2.5)
    for spec in [*specs, *headline_rows(config, best), *trial_rows(config)]:
        for seed in spec.seeds:
            add(f"train-fp32-s{seed}", "train", train.epochs * epoch)
            if spec.epochs is not None:
                stage = "train" if spec.kind == "train" else "admm"
                distilled = config.distill > 0 and (stage == "admm" or "--distill" in spec.options)
                weight = (_QUANTIZED if stage == "admm" else 1.0) * (_DISTILLED if distilled else 1.0)
                epochs = _value(list(spec.options), "--epochs", spec.epochs)
                add(f"{stage}-{model_name(spec, seed)}", stage, epochs * epoch, weight)
    seconds = [s["seconds"] for s in out if s["seconds"] is not None]
    return {
        "parameters": model.n_parameters(), "steps_an_epoch": epoch, "stages": out,
        "memory": memory(model, train, config.distill > 0), "seconds": sum(seconds) if seconds else None,
    }  # fmt: skip


def memory(model: ModelConfig, train: TrainConfig, distill: bool) -> dict[str, int]:
    """Peak bytes of weights, optimiser and activations of the training stages; an estimate from shapes."""
    weights, tokens = model.n_parameters(), train.batch_size * train.seq_len
    d, f, v, half = model.d_model, model.d_ffn, model.vocab_size, 2
    # Kept for the backward pass, bf16: about 14 d and 3 f a layer and token, and three maps of attention.
    attention = 3 * train.batch_size * model.n_heads * train.seq_len**2
    activations = half * (model.n_layers * (tokens * (14 * d + 3 * f) + attention) + 4 * tokens * d)
    logits = tokens * v * half * (2 if distill else 1)
    teacher = _TEACHER * weights if distill else 0
    # Curvature: fp32, no fused loss, and a graph of the backward pass as well.
    double = 4 * weights * 4 + 3 * 2 * activations + 6 * tokens * v * 4
    return {
        "train": weights * (4 + _TRAIN) + activations + logits,
        "admm": weights * (4 + _ADMM) + teacher + activations + logits,
        "nas": weights * (4 + _TRAIN + 4 * len(CHOICES)) + activations + logits,
        "sensitivity": double,
    }


def _most(options: list[str], default: int) -> int:
    return int(options[options.index("--samples") + 2]) if "--samples" in options else default


def _value(options: list[str], name: str, default: float) -> float:
    return float(options[options.index(name) + 1]) if name in options else default
