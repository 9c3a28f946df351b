"""One corpus, every model made of it and measured: the stages behind reproduce and demo, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint import Checkpoint
from lowbit.container import read_header
from lowbit.errors import LowbitError
from lowbit.files import read_json
from lowbit.nbest import read_nbest
from lowbit.plan import Plan
from lowbit.significance import bootstrap, mapsswe
from lowbit.tools.pipeline import Pipeline
from lowbit.tools.training.config import TrainConfig, config_file
from lowbit.tools.training.data import corpus_file
from lowbit.wer import score_corpus


@dataclass(frozen=True)
class Recipe:
    """What a corpus asks for beyond its training configuration.

    Attributes:
        plan: the mixed plan, by rules of :meth:`lowbit.plan.Plan.manual`.
        dropout_scale, epochs, lr: of both trainings that start from the full-precision model: a factor on its dropout,
            their length (its own), their peak learning rate (half of its own).
    """

    plan: tuple[tuple[str, int], ...]
    dropout_scale: float = 0.7
    epochs: float | None = None
    lr: float | None = None

    def options(self, config: TrainConfig) -> list[str]:
        """Arguments that train and admm share."""
        values = {"dropout-scale": self.dropout_scale, "epochs": self.epochs or config.epochs}
        values |= {"lr": self.lr or config.lr / 2}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# Set by hand, not searched or compared. The vocabulary matrix is nearly half of the small PTB model, and 5 % of the
# ATIS one, where 4 bits of it cost little.
_HALF_VOCABULARY = (("embed", 2), ("*.attn.[qk]", 1), ("*.attn.[vo]", 4), ("*.mlp.*", 2))
_SMALL_VOCABULARY = (("embed", 4), ("*.attn.[qk]", 1), ("*.attn.[vo]", 2), ("*.mlp.*", 2))
RECIPES = {
    "ptb-small": Recipe(_HALF_VOCABULARY, epochs=6),
    "demo": Recipe(_HALF_VOCABULARY),
    # 3,000 sentences: what trains on for 60 epochs overfits (validation PPL 8.2 and more, quantized or not); 6 do not.
    "atis": Recipe(_SMALL_VOCABULARY, epochs=6, lr=2e-4),
}


class Experiment:
    """The stages of one corpus.

    Args:
        data: folder with train and valid text, and perhaps a test text, and N-best lists dev.jsonl and test.jsonl.
        name: the training configuration, which has an entry in ``RECIPES``.
        out: folder of all outputs.
        control: also train the full-precision model as long again.

    Raises:
        LowbitError: texts missing or ambiguous, or one of the two lists without the other.
    """

    def __init__(self, data: str | Path, name: str, out: str | Path, restart: bool = False, control: bool = True):
        self.data, self.name, self.control = Path(data), name, control
        self.recipe = RECIPES[name]
        self.pipeline = Pipeline(out, restart)
        self.config, self.config_file = TrainConfig.find(name), str(config_file(name))
        self.texts = {split: str(corpus_file(self.data, split)) for split in ("train", "valid")}
        if any(self.data.glob("*test.txt")):
            self.texts["test"] = str(corpus_file(self.data, "test"))
        self.lists = {s: str(p) for s in ("dev", "test") if (p := self.data / f"{s}.jsonl").is_file()}
        if len(self.lists) == 1:
            raise LowbitError(
                f"{self.data}: dev.jsonl and test.jsonl go together; only {next(iter(self.lists))}.jsonl is there"
            )

    def run(self) -> list[dict[str, Any]]:
        """All rows, full precision first."""
        step, path = self.pipeline.run, self.pipeline.path
        text = [self.texts["train"], self.texts["valid"], self.config_file]
        fp, admm, options = path("fp.safetensors"), path("admm.safetensors"), self.recipe.options(self.config)
        train = ["--data", str(self.data), "--config", self.name]
        step("train", "train", [*train, "--out", fp], text, [fp])
        plans = self._write_plans(fp)
        rows = [self._row("fp32", "full precision", fp)]
        if self.control:
            again = path("fp-again.safetensors")
            step("train-again", "train", [*train, "--init", fp, *options, "--out", again], [fp, *text], [again])
            rows.append(self._row("fp32-again", "full precision, same extra steps", again))
        for name, title in (("uniform2", "post-training, 2 bits"), ("mixed", "post-training, mixed")):
            packed = path(f"ptq-{name}.lowbit")
            step(f"pack-ptq-{name}", "pack", [fp, "--plan", plans[name], "--out", packed], [fp, plans[name]], [packed])
            rows.append(self._row(f"ptq-{name}", title, packed))
        argv = [fp, "--plan", plans["mixed"], "--data", str(self.data), *options, "--out", admm]
        step("admm", "admm", argv, [fp, plans["mixed"], *text], [admm])
        packed = path("admm.lowbit")
        step("pack-admm", "pack", [admm, "--out", packed], [admm], [packed])
        rows.append(self._row("admm-mixed", "ADMM, mixed", packed))
        self._compare(rows)
        return rows

    def _write_plans(self, fp: str) -> dict[str, str]:
        config = Checkpoint.load(fp).config
        plans = {"uniform2": Plan.uniform(config, 2), "mixed": Plan.manual(config, self.recipe.plan)}
        for name, plan in plans.items():
            plan.save(self.pipeline.path(f"plan-{name}.json"))
        return {name: self.pipeline.path(f"plan-{name}.json") for name in plans}

    def _row(self, key: str, title: str, model: str) -> dict[str, Any]:
        """Size, perplexities and word error rates of one model."""
        row: dict[str, Any] = {"key": key, "title": title} | sizes(model)
        for split in ("valid", "test"):
            if text := self.texts.get(split):
                argv = [model, "--text", text, "--mode", self.config.mode]
                result = self.pipeline.run(f"evaluate-{key}-{split}", "evaluate", argv, [model, text], [])
                row |= {f"{split}_ppl": result["ppl"], f"{split}_tokens_per_second": result["tokens_per_second"]}
                row |= {"mode": result["mode"], "stride": result["stride"]}
        if len(self.lists) == 2:
            row |= self._rescore(key, model)
        return row

    def _rescore(self, key: str, model: str) -> dict[str, Any]:
        path, lists, row = self.pipeline.path, self.lists, {}
        weights = path(f"{key}.weights.json")
        for split, options, written in (("dev", ["--tune"], [weights]), ("test", [], [])):
            out = path(f"{key}.{split}.jsonl")
            argv = [model, "--nbest", lists[split], "--out", out, "--weights", weights, *options]
            inputs = [model, lists[split]] + ([] if written else [weights])
            result = self.pipeline.run(f"rescore-{key}-{split}", "rescore", argv, inputs, [out, *written])
            row |= {f"{split}_{name}_wer": result[f"{name}_wer"] for name in ("first_pass", "rescored", "oracle")}
            row["utterances_per_second"] = result["utterances_per_second"]
        return row | {"weights": read_json(weights)}

    def _compare(self, rows: list[dict[str, Any]]) -> None:
        """Test WER of every row against the first pass and against full precision: interval and MAPSSWE."""
        if len(self.lists) < 2:
            return
        lists = list(read_nbest(self.lists["test"]))
        refs, first = [u.ref for u in lists], [u.hyps[0].text for u in lists]
        best = {
            r["key"]: [u.hyps[0].text for u in read_nbest(self.pipeline.path(f"{r['key']}.test.jsonl"))] for r in rows
        }
        for row in rows:
            ours = best[row["key"]]
            for name, other in (("first_pass", first), ("fp32", best["fp32"])):
                a, b = score_corpus(refs, ours), score_corpus(refs, other)
                interval = bootstrap(a.errors, a.ref_words, b.errors)
                row[f"against_{name}"] = {
                    "wer_difference": 100 * (a.wer - b.wer), "low": 100 * interval.low, "high": 100 * interval.high,
                    "mapsswe_p": mapsswe(refs, ours, other).p,
                }  # fmt: skip


def sizes(model: str) -> dict[str, Any]:
    """Bytes of a model file and its ratio to the fp32 checkpoint."""
    if model.endswith(".lowbit"):
        header = read_header(model)
        return {"bytes": header.file_nbytes, "ratio": header.ratio, "mean_bits": header.mean_bits}
    return {"bytes": Checkpoint.load(model).fp32_nbytes, "ratio": 1.0, "mean_bits": 32.0}
