"""Run a table: every stage once, resumable, then the statistics of every row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.files import read_json
from lowbit.plan import Plan
from lowbit.tools.experiment import sizes
from lowbit.tools.pipeline import Busy, Pipeline
from lowbit.tools.search.choices import choice_name
from lowbit.tools.table_parts.config import TableConfig
from lowbit.tools.table_parts.paired import compare, perplexity_interval
from lowbit.tools.table_parts.rows import EQUAL_BYTES, SEARCHED, RowSpec, first_rows, headline_rows, plans, trial_rows
from lowbit.tools.training.admm_options import AdmmOptions
from lowbit.tools.training.config import TrainConfig, config_file
from lowbit.tools.training.data import corpus_file

SPLITS = ("valid", "test")
WAIT_SECONDS = 0.5  # for other processes


class Table:
    """The stages of a table in one folder.

    Args:
        data: folder with train, valid and test text.
        out: folder of all outputs.

    Raises:
        LowbitError: a text is missing.
    """

    def __init__(self, data: str | Path, config: TableConfig, out: str | Path, restart: bool = False):
        self.data, self.config = str(data), config
        self.texts = {split: str(corpus_file(data, split)) for split in ("train", *SPLITS)}
        self.train_config, self.train_file = TrainConfig.find(config.train), str(config_file(config.train))
        self.pipeline = Pipeline(out, restart)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Rows with their statistics, and the searches behind them."""
        search = self._search
        specs = first_rows(self.config)
        rows = [self._row(spec) for spec in specs]
        best = self._best(specs)
        rows += [self._row(spec) for spec in headline_rows(self.config, best)]
        trials = [self._trial(spec) for spec in trial_rows(self.config)]
        return {
            "rows": rows, "best": best.key, "trials": trials, "search": search, "table": self.config.to_dict(),
        }  # fmt: skip

    def run_shared(self) -> None:
        """Run every stage but those that other processes run meanwhile; returns when none is left."""
        tasks = self._tasks()
        self.pipeline.wait = False
        while tasks:
            left = [task for task in tasks if not _ended(task)]
            if len(left) == len(tasks):
                time.sleep(WAIT_SECONDS)
            tasks = left
        self.pipeline.wait = True

    def _tasks(self) -> list[Callable[[], Any]]:
        """All work, in parts that wait for little: only the searches, and for the headline the searched rows."""
        tasks: list[Callable[[], Any]] = [partial(self._full_precision, seed) for seed in self.config.seeds]
        tasks += [partial(self._searched_row, spec) for spec in first_rows(self.config)]
        headline = headline_rows(self.config, RowSpec("", "", "", seeds=tuple(self.config.seeds[:1])))
        tasks += [partial(self._headline_row, i, seed) for i, spec in enumerate(headline) for seed in spec.seeds]
        return tasks + [partial(self._searched_row, spec, ("valid",)) for spec in trial_rows(self.config)]

    def _searched_row(self, spec: RowSpec, splits: tuple[str, ...] = SPLITS) -> None:
        if spec.plan:
            _ = self._search
        for split in splits:
            self._nll(spec, split)

    def _headline_row(self, index: int, seed: int) -> None:
        spec = headline_rows(self.config, self._best(first_rows(self.config)))[index]
        self._searched_row(replace(spec, seeds=(seed,)))

    def _best(self, specs: list[RowSpec]) -> RowSpec:
        """The searched row that is best on validation text."""
        _ = self._search
        return min((s for s in specs if s.key in SEARCHED), key=lambda s: self._nll(s, "valid").mean())

    # Models

    def _path(self, name: str) -> str:
        return self.pipeline.path(name)

    def _corpus(self) -> list[str]:
        return [self.texts["train"], self.texts["valid"], self.train_file]

    def _full_precision(self, seed: int) -> str:
        out = self._path(f"fp32-s{seed}.safetensors")
        argv = ["--data", self.data, "--config", self.config.train, "--seed", str(seed), "--out", out]
        result = self.pipeline.run(f"train-fp32-s{seed}", "train", argv, self._corpus(), [out])
        self.seconds[f"fp32-s{seed}"] = result["seconds"]
        return out

    @cached_property
    def _search(self) -> dict[str, Any]:
        """Sensitivities, supernet and all plans."""
        step, c, found = self.pipeline.run, self.config, {}
        fp = self._full_precision(c.seeds[0])
        for metric, options in (("hessian", c.hessian), ("kl", c.kl)):
            out = self._path(f"sens-{metric}.json")
            argv = [fp, "--data", self.data, "--metric", metric, "--ratio", str(c.ratio), *options]
            argv += ["--out", out]
            found[metric] = step(f"sensitivity-{metric}", "sensitivity", argv, [fp, *self._corpus()], [out])
        for name, options in plans(c).items():
            found[f"plan-{name}"] = self._allocate(name, "kl" if name == "kl" else "hessian", options)
        budget = ["--bytes", str(found["plan-uniform-2"]["bytes"])]
        found[f"plan-{EQUAL_BYTES}"] = self._allocate(EQUAL_BYTES, "hessian", budget)
        out = self._plan("nas")
        lr = [] if "--lr" in c.nas else ["--lr", str(c.lr)]
        argv = [fp, "--data", self.data, "--ratio", str(c.ratio), *lr, *c.nas, "--out", out]
        found["nas"] = step("nas", "nas", argv, [fp, *self._corpus()], [out])
        return {key: {k: v for k, v in value.items() if "seconds" not in k} for key, value in found.items()}

    def _allocate(self, name: str, metric: str, options: list[str]) -> dict[str, Any]:
        sens, out = self._path(f"sens-{metric}.json"), self._plan(name)
        return self.pipeline.run(f"allocate-{name}", "allocate", [sens, *options, "--out", out], [sens], [out])

    def _plan(self, name: str) -> str:
        return self._path(f"plan-{name}.json")

    def _model(self, spec: RowSpec, seed: int) -> str:
        """The model file of a row and seed, made if it is not there."""
        fp, name = self._full_precision(seed), model_name(spec, seed)
        if spec.kind == "fp32":
            return fp
        if spec.kind == "train":
            out = self._path(f"{name}.safetensors")
            argv = ["--data", self.data, "--config", self.config.train, "--init", fp, "--out", out]
            argv += [*self._training(spec, seed), "--warmup", str(AdmmOptions().warmup), *spec.options]
            result = self.pipeline.run(f"train-{name}", "train", argv, [fp, *self._corpus()], [out])
            self.seconds[name] = result["seconds"]
            return out
        return self._quantized(spec, seed, fp, name)

    def _quantized(self, spec: RowSpec, seed: int, fp: str, name: str) -> str:
        plan, packed, c = self._plan(spec.plan), self._path(f"{name}.lowbit"), self.config
        if spec.kind == "post":
            self.pipeline.run(f"pack-{name}", "pack", [fp, "--plan", plan, "--out", packed], [fp, plan], [packed])
            return packed
        trained = self._path(f"{name}.safetensors")
        argv = [fp, "--plan", plan, "--data", self.data, "--method", spec.kind, *self._training(spec, seed)]
        own = c.admm if spec.kind == "admm" else ()
        argv += ["--distill", str(c.distill), *own, *spec.options, "--out", trained]
        result = self.pipeline.run(f"admm-{name}", "admm", argv, [fp, plan, *self._corpus()], [trained])
        self.seconds[name] = result["seconds"]
        self.pipeline.run(f"pack-{name}", "pack", [trained, "--out", packed], [trained], [packed])
        return packed

    def _training(self, spec: RowSpec, seed: int) -> list[str]:
        """What every training from the full-precision model shares."""
        c = self.config
        values = {"epochs": spec.epochs, "lr": c.lr, "dropout-scale": c.dropout_scale, "seed": seed}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    # Statistics

    def _nll(self, spec: RowSpec, split: str) -> np.ndarray:
        """Token NLL of every seed's model, fp32 [S, T]."""
        out = []
        for seed in spec.seeds:
            model, name = self._model(spec, seed), model_name(spec, seed)
            file = self._path(f"{name}.{split}.npy")
            argv = [model, "--text", self.texts[split], "--mode", self.train_config.mode, "--token-nll", file]
            self.pipeline.run(f"evaluate-{name}-{split}", "evaluate", argv, [model, self.texts[split]], [file])
            out.append(np.load(file))
        return np.stack(out)

    def _trial(self, spec: RowSpec) -> dict[str, Any]:
        nll = self._nll(spec, "valid")
        ppl, low, high = perplexity_interval(nll)
        return {
            "title": spec.title, "options": list(spec.options), "valid_ppl": ppl, "valid_low": low, "valid_high": high,
        }  # fmt: skip

    def _row(self, spec: RowSpec) -> dict[str, Any]:
        models = [self._model(spec, seed) for seed in spec.seeds]
        row: dict[str, Any] = {"key": spec.key, "title": spec.title, "kind": spec.kind, "seeds": list(spec.seeds)}
        row |= sizes(models[0]) | {"epochs": spec.epochs}
        baseline = RowSpec("fp32", "", "fp32", seeds=spec.seeds)
        for split in SPLITS:
            nll = self._nll(spec, split)
            ppl, low, high = perplexity_interval(nll)
            row |= {f"{split}_ppl": ppl, f"{split}_low": low, f"{split}_high": high}
            row[f"{split}_ppl_by_seed"] = np.exp(nll.mean(axis=1, dtype=np.float64)).tolist()
            if spec.kind != "fp32":
                row[f"{split}_against_fp32"] = compare(nll, self._nll(baseline, split)).to_dict()
        if spec.plan:
            plan = Plan.load(self._plan(spec.plan))
            row["matrices"] = {m: choice_name(entry) for m, entry in plan.items()}
            row["predicted_bytes"] = _predicted(read_json(self._plan(spec.plan)))
        row["seconds"] = [self.seconds.get(model_name(spec, seed)) for seed in spec.seeds]
        return row


def _ended(task: Callable[[], Any]) -> bool:
    """Do a task, unless a stage of it is another process's."""
    try:
        task()
    except Busy:
        return False
    return True


def model_name(spec: RowSpec, seed: int) -> str:
    """Rows that add seeds to another share its models."""
    return f"{spec.key.removesuffix('-seeds')}-s{seed}"


def _predicted(plan: dict[str, Any]) -> int:
    return (plan.get("allocation") or plan["search"])["bytes"]
