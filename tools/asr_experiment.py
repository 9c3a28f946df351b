"""One speech corpus: its language models made, its lists rescored by each, and every pair compared that matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import read_json
from lowbit.nbest import read_nbest
from lowbit.significance import bootstrap, mapsswe
from lowbit.tools.asr_recipes import RECIPES, SMOOTHING, find_irstlm, train_ngram
from lowbit.tools.experiment import sizes
from lowbit.tools.pipeline import Pipeline
from lowbit.tools.training.config import TrainConfig, config_file
from lowbit.tools.training.data import corpus_file
from lowbit.wer import score_corpus

SAMPLES = ("16", "48")  # at least and at most, of 512 tokens: a few minutes on two cores
FIRST_PASS, UNKNOWN = "first", "unknown_weight"
# Row against row: (the one, the other). MAPSSWE and the paired interval are of one minus other.
COMPARISONS = (
    ("ngram", FIRST_PASS), ("fp32", FIRST_PASS), ("mixed", FIRST_PASS), ("mixed", "fp32"),
    ("mixed", "mixed-unk"), ("shallow", FIRST_PASS), ("mixed", "shallow"),
    ("fp32+ngram", "ngram"), ("mixed+ngram", "ngram"),
    ("mixed+ngram", "mixed"), ("mixed+ngram", "fp32+ngram"), ("mixed+ngram", FIRST_PASS),
)  # fmt: skip


class AsrExperiment:
    """The stages of one corpus.

    Args:
        data: folder with train and valid text and the lists (:class:`~lowbit.tools.asr_recipes.AsrRecipe`).
        name: the corpus, which has an entry in ``RECIPES``.
        out: folder of all outputs.
        ratio: compression of the mixed-precision model.
        given: files to use instead of making them: "fp", "shallow" (checkpoints), "plan", "packed", "ngram".

    Raises:
        LowbitError: texts or lists missing, or no program that makes the n-gram and none given.
    """

    def __init__(
        self, data: str | Path, name: str, out: str | Path, ratio: float, given: dict[str, str], restart: bool = False
    ):
        self.data, self.name, self.ratio, self.given, self.recipe = Path(data), name, ratio, given, RECIPES[name]
        self.texts = {split: str(corpus_file(self.data, split)) for split in ("train", "valid")}
        needed = ("dev",) if self.recipe.folds else ("dev", "test")
        self.lists = {split: str(self.data / f"{split}.jsonl") for split in needed}
        if absent := [path for path in self.lists.values() if not Path(path).is_file()]:
            raise LowbitError(f"{absent[0]}: no such list")
        if "ngram" not in given:
            find_irstlm()
        self.pipeline = Pipeline(out, restart)

    def run(self) -> list[dict[str, Any]]:
        """All rows, the first pass first."""
        fp = self.given.get("fp") or self._train("fp", self.recipe.config)
        shallow = self.given.get("shallow") or self._train("shallow", self.recipe.shallow)
        packed = self.given.get("packed") or self._compress(fp)
        arpa = self.given.get("ngram") or self._ngram()
        rows = [
            self._row("ngram", "trigram", None, arpa),
            self._row("shallow", "one-layer LM, fp32", shallow, None),
            self._row("fp32", "LM, fp32", fp, None),
            self._row("mixed", "LM, mixed precision", packed, None),
            self._row(
                "mixed-unk", "LM, mixed precision, no weight for unknown words", packed, None, ["--hold", UNKNOWN]
            ),
            self._row("fp32+ngram", "LM, fp32, + trigram", fp, arpa),
            self._row("mixed+ngram", "LM, mixed precision, + trigram", packed, arpa),
        ]
        return self._judge(rows)

    def _train(self, key: str, config: str) -> str:
        out = self.pipeline.path(f"{key}.safetensors")
        inputs = [self.texts["train"], self.texts["valid"], str(config_file(config))]
        self.pipeline.run(key, "train", ["--data", str(self.data), "--config", config, "--out", out], inputs, [out])
        return out

    def _ngram(self) -> str:
        out, text = self.pipeline.path("3gram.arpa"), self.texts["train"]
        command = " ".join(["tlm", f"-tr={text}", "-n=3", *SMOOTHING, f"-oarpa={out}"])
        self.pipeline.once("ngram", command, lambda: train_ngram(text, out), [text], [out])
        return out

    def _compress(self, fp: str) -> str:
        """Sensitivities, the best plan of the wanted size, ADMM, packing."""
        step, path, recipe = self.pipeline.run, self.pipeline.path, self.recipe
        sens, plan, admm, packed = map(path, ("sens.json", "plan.json", "admm.safetensors", "mixed.lowbit"))
        text = [self.texts["train"], self.texts["valid"]]
        data = ["--data", str(self.data)]
        if "plan" in self.given:
            plan = self.given["plan"]
        else:
            argv = [fp, *data, "--metric", "kl", "--samples", *SAMPLES, "--ratio", str(self.ratio), "--out", sens]
            step("sensitivity", "sensitivity", argv, [fp, *text], [sens])
            step("allocate", "allocate", [sens, "--ratio", str(self.ratio), "--out", plan], [sens], [plan])
        options = ["--epochs", recipe.epochs, "--lr", recipe.lr, "--dropout-scale", recipe.dropout_scale]
        argv = [fp, "--plan", plan, *data, *map(str, options), "--out", admm]
        step("admm", "admm", argv, [fp, plan, *text], [admm])
        step("pack", "pack", [admm, "--out", packed], [admm], [packed])
        return packed

    def _row(
        self, key: str, title: str, model: str | None, arpa: str | None, tuning: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Size, perplexity and word error rates of one combination; its lists stay in KEY.test.jsonl."""
        row: dict[str, Any] = {"key": key, "title": title}
        if model and not arpa and not tuning:
            mode = TrainConfig.find(self.recipe.config).mode
            argv = [model, "--text", self.texts["valid"], "--mode", mode]
            result = self.pipeline.run(f"evaluate-{key}", "evaluate", argv, [model, self.texts["valid"]], [])
            row |= sizes(model) | {"valid_ppl": result["ppl"]}
        elif arpa and not model:
            row["bytes"] = Path(arpa).stat().st_size
        models = [model] if model else []
        inputs = [f for f in (model, arpa) if f]
        options = [*models, *(["--ngram", arpa] if arpa else [])]
        result, row["weights"] = self._rescore(key, options, inputs, tuning)
        names = ("first_pass_wer", "rescored_wer", "oracle_wer", "oov", "words")
        return row | {n: result[n] for n in names} | {"utterances_per_second": result["utterances_per_second"]}

    def _rescore(
        self, key: str, options: list[str], inputs: list[str], tuning: Sequence[str] = ()
    ) -> tuple[dict[str, Any], Any]:
        """Test lists rescored with weights from dev, or cross-validated; the result and the weights."""
        path, run = self.pipeline.path, self.pipeline.run
        out, weights = path(f"{key}.test.jsonl"), path(f"{key}.weights.json")
        tune = ["--tune", *(["--average-am"] if self.recipe.average_am else []), *tuning]
        if self.recipe.folds:
            lists = self.lists["dev"]
            argv = [*options, "--nbest", lists, "--out", out, *tune, "--folds", str(self.recipe.folds)]
            result = run(f"rescore-{key}", "rescore", argv, [*inputs, lists], [out])
            return result, result["fold_weights"]
        dev, test = self.lists["dev"], self.lists["test"]
        argv = [*options, "--nbest", dev, "--out", path(f"{key}.dev.jsonl"), *tune, "--weights", weights]
        run(f"tune-{key}", "rescore", argv, [*inputs, dev], [weights])
        argv = [*options, "--nbest", test, "--out", out, "--weights", weights]
        return run(f"rescore-{key}", "rescore", argv, [*inputs, test, weights], [out]), read_json(weights)

    def _judge(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every row's WER with its interval, and the comparisons; the first pass becomes a row of its own."""
        lists = list(read_nbest(self.lists["dev" if self.recipe.folds else "test"]))
        refs = [u.ref for u in lists]
        texts = {FIRST_PASS: [u.hyps[0].text for u in lists]}
        for row in rows:
            texts[row["key"]] = [u.hyps[0].text for u in read_nbest(self.pipeline.path(f"{row['key']}.test.jsonl"))]
        errors = {key: score_corpus(refs, hyps) for key, hyps in texts.items()}
        rows = [{"key": FIRST_PASS, "title": "first pass"}, *rows]
        for row in rows:
            e = errors[row["key"]]
            row |= {"wer": 100 * e.wer, "interval": _percent(bootstrap(e.errors, e.ref_words))} | e.totals()
            row["against"] = {}
            for one, other in COMPARISONS:
                if one != row["key"]:
                    continue
                b = errors[other]
                test = mapsswe(refs, texts[one], texts[other])
                interval = _percent(bootstrap(e.errors, e.ref_words, b.errors))
                row["against"][other] = {
                    "difference": 100 * (e.wer - b.wer), "interval": interval,
                    "mapsswe_p": test.p, "mapsswe_z": test.z, "segments": test.segments,
                }  # fmt: skip
        return rows


def _percent(interval: Any) -> list[float]:
    return [100 * interval.low, 100 * interval.high]
