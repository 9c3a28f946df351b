"""The speech experiments on toy models: every stage's arguments, resumption, the table and the picture."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel, write_packed
from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.nbest import Hypothesis, NBest, write_nbest
from lowbit.ngram import NGram
from lowbit.quantize import quantize
from lowbit.tools import asr_recipes, asr_results, reproduce_asr
from lowbit.tools.asr_experiment import AsrExperiment
from lowbit.tools.asr_recipes import RECIPES
from lowbit.tools.pipeline import Pipeline
from lowbit.tools.training.config import TrainConfig
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=6, d_model=32, n_layers=1, n_heads=2, d_ffn=48, max_len=12)
VOCAB = Vocab(["</s>", "<unk>", *"abcd"])
ARPA = """\\data\\
ngram 1=7
ngram 2=1

\\1-grams:
-1.0\t</s>
-99\t<s>
-1.2\t<unk>
-0.5\ta\t0
-0.7\tb
-0.9\tc
-0.9\td

\\2-grams:
-0.3\ta b

\\end\\
"""


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Text and lists of a corpus of four words; four speakers."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(list("abcd"), rng.integers(2, 6))) for _ in range(60)]
    (folder / "lm.train.txt").write_text("\n".join(lines[:50]) + "\n")
    (folder / "lm.valid.txt").write_text("\n".join(lines[50:]) + "\n")
    for split, count in (("dev", 24), ("test", 16)):
        lists = []
        for i in range(count):
            ref = lines[(7 * i) % 60]
            noisy = [" ".join(w if rng.random() > 0.4 else "zz" for w in ref.split()) for _ in range(3)]
            scores = sorted(-rng.random(3), reverse=True)
            hyps = [Hypothesis(t, float(s)) for t, s in zip([*noisy[:2], ref], scores)]
            lists.append(NBest(f"{split}{i}", hyps, ref, {"spk": f"s{i % 12}"}))
        write_nbest(folder / f"{split}.jsonl", lists)
    return folder


@pytest.fixture
def given(tmp_path) -> dict[str, str]:
    """Models, so that nothing is trained."""
    torch.manual_seed(0)
    checkpoint = Checkpoint.of_model(TransformerLM(CONFIG), VOCAB)
    for name in ("fp", "shallow"):
        checkpoint.save(tmp_path / f"{name}.safetensors")
    tensors = checkpoint.tensors
    matrices = {m: PackedMatrix.from_quant_tensor(quantize(tensors[f"{m}.weight"], 2)) for m in CONFIG.matrix_shapes()}
    vectors = {name: tensors[name] for name in CONFIG.vector_shapes()}
    write_packed(tmp_path / "m.lowbit", PackedModel(CONFIG, VOCAB, matrices, vectors, checkpoint.fp32_nbytes))
    (tmp_path / "1.arpa").write_text(ARPA)
    files = {"fp": "fp.safetensors", "shallow": "shallow.safetensors", "packed": "m.lowbit", "ngram": "1.arpa"}
    return {name: str(tmp_path / file) for name, file in files.items()}


def arguments(corpus: Path, name: str, out: Path, given: dict[str, str]) -> list[str]:
    options = [word for key, path in given.items() for word in (f"--{key}", path)]
    return ["--corpus", name, "--data", str(corpus), "--out", str(out), *options]


@pytest.mark.parametrize("name", ["atis", "l2"])
def test_rescoring_with_given_models(corpus, given, tmp_path, capsys, monkeypatch, kenlm, name):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install lowbit[plot])")
    monkeypatch.setitem(RECIPES, "l2", replace(RECIPES["l2"], folds=3))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "RESULTS.md").write_text("# Results\n")
    command = [*arguments(corpus, name, tmp_path / "out", given), "--docs", str(docs)]
    assert reproduce_asr.main(command) == 0
    result = json.loads((docs / "results" / f"asr-{name}.json").read_text())
    rows = {row["key"]: row for row in result["rows"]}
    assert list(rows) == ["first", "ngram", "shallow", "fp32", "mixed", "mixed-unk", "fp32+ngram", "mixed+ngram"]
    assert set(rows["mixed"]["against"]) == {"first", "fp32", "shallow", "mixed-unk"}
    assert all(r["interval"][0] <= r["wer"] <= r["interval"][1] for r in rows.values())
    # The reference is in every list, and only wrong hypotheses have unknown words.
    assert rows["mixed"]["oracle_wer"] == 0 and rows["mixed"]["wer"] < rows["first"]["wer"]
    assert rows["first"]["utterances"] == (24 if name == "l2" else 16)
    text = (docs / "RESULTS.md").read_text()
    assert f"<!-- begin asr-{name} -->\n| system |" in text and f"![asr-{name}](results/asr-{name}.png)" in text
    assert (docs / "results" / f"asr-{name}.png").stat().st_size > 1000
    capsys.readouterr()
    # Again: every stage is done, and the section is replaced, not repeated.
    assert reproduce_asr.main(command) == 0
    assert "[rescore-" not in capsys.readouterr().err
    assert (docs / "RESULTS.md").read_text() == text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_stage_gets_arguments_that_it_knows(corpus, tmp_path, monkeypatch, name):
    """The stages that train are not run: their parsers read what they would be given."""
    seen = []

    def run(self, key, stage, argv, inputs, outputs):
        args = importlib.import_module(f"lowbit.tools.{stage}").parser().parse_args(argv)
        seen.append(stage)
        for path in outputs:
            Path(path).write_text("{}")
        return vars(args) | {"ppl": 1.0, "fold_weights": []}

    monkeypatch.setattr(Pipeline, "run", run)
    monkeypatch.setattr(Pipeline, "once", lambda self, key, command, work, inputs, outputs: {})
    experiment = AsrExperiment(corpus, name, tmp_path / "out", 16.0, {"ngram": "x.arpa"})
    experiment._train("fp", experiment.recipe.config)
    experiment._train("shallow", experiment.recipe.shallow)
    experiment._compress("fp.safetensors")
    experiment._rescore("mixed", ["m.lowbit", "--ngram", "x.arpa"], [])
    last = ["rescore"] if experiment.recipe.folds else ["rescore", "rescore"]
    assert seen == ["train", "train", "sensitivity", "allocate", "admm", "pack", *last]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_shallow_model_has_one_layer_and_the_same_text(name):
    deep, shallow = (TrainConfig.find(config) for config in (RECIPES[name].config, RECIPES[name].shallow))
    assert shallow.model["n_layers"] == 1 and deep.model["n_layers"] > 1
    for field in ("mode", "min_count", "max_vocab", "rare_to_unk", "seq_len"):
        assert getattr(deep, field) == getattr(shallow, field)


@pytest.mark.data
def test_irstlm_makes_a_model_that_kenlm_reads(kenlm, data_dir, tmp_path, monkeypatch):
    try:
        asr_recipes.find_irstlm()
    except LowbitError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)  # IRSTLM works in a folder of its own: a relative path is still ours
    result = asr_recipes.train_ngram(data_dir / "atis" / "lm.train.txt", "3.arpa")
    model = NGram(tmp_path / "3.arpa")
    assert model.order == result["order"] == 3 and result["bytes"] > 0
    lines = (data_dir / "atis" / "lm.valid.txt").read_text().splitlines()
    tokens = np.concatenate([model.score(line)[0] for line in lines])
    assert np.exp(-tokens.mean()) == pytest.approx(9.846, abs=0.01)


def test_texts_that_are_too_small_are_refused_with_the_reason(corpus, tmp_path):
    try:
        asr_recipes.find_irstlm()
    except LowbitError as error:
        pytest.skip(str(error))
    with pytest.raises(LowbitError, match=r"IRSTLM failed: .*count-of-counts"):
        asr_recipes.train_ngram(corpus / "lm.train.txt", tmp_path / "3.arpa")
    assert not (tmp_path / "3.arpa").exists()


def test_without_irstlm_a_model_must_be_given(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asr_recipes.shutil, "which", lambda name, path=None: None)
    assert reproduce_asr.main(arguments(corpus, "atis", tmp_path / "out", {})) == 2
    assert "needs IRSTLM (Debian package irstlm)" in capsys.readouterr().err


def test_bad_arguments(corpus, given, tmp_path, capsys):
    (corpus / "test.jsonl").unlink()
    for options, message in (
        (arguments(corpus, "atis", tmp_path / "out", given), "test.jsonl: no such list"),
        (arguments(corpus, "atis", tmp_path / "none" / "out", given), "does not exist"),
        (arguments(corpus, "atis", tmp_path / "out", {"fp": "none.safetensors"}), "none.safetensors: no such file"),
        (arguments(tmp_path, "atis", tmp_path / "out", given), "train"),
    ):
        assert reproduce_asr.main(options) == 2
        assert message in capsys.readouterr().err


def test_small_probabilities_are_printed_as_such():
    assert asr_results.p_value(0.0004) == "p < 0.001" and asr_results.p_value(0.0421) == "p = 0.042"
