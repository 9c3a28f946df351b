"""tools/allocate.py: optima by brute force, budgets to the byte, controls, bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.model import TransformerLM
from lowbit.plan import Plan
from lowbit.tools import allocate, pack
from lowbit.tools.search.choices import CHOICES, choice_name, make_plan
from lowbit.tools.search.filesize import FileSize
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=300, d_model=64, n_layers=1, n_heads=2, d_ffn=256)
NAMES = list(CHOICES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint m.safetensors and its sens.json, whose costs fall with the bits as real ones do."""
    folder = tmp_path_factory.mktemp("allocate")
    torch.manual_seed(1)
    checkpoint = Checkpoint.of_model(TransformerLM(CONFIG), Vocab(["</s>", "<unk>", *(f"w{i}" for i in range(298))]))
    checkpoint.save(folder / "m.safetensors")
    rng = np.random.default_rng(2)
    matrices = {}
    for name in CONFIG.matrix_shapes():
        error = [0.6, 0.3, 0.12, 0.01, 1e-4]
        slope = 10 ** rng.uniform(-4, -1)
        omega = [slope * e * rng.uniform(0.8, 1.2) for e in error]
        matrices[name] = {"omega": dict(zip(NAMES, omega)), "squared_error": dict(zip(NAMES, error))}
    sens = {"version": 1, "metric": "hessian", "choices": NAMES, "matrices": matrices,
            "file": FileSize.of(checkpoint).to_dict()}  # fmt: skip
    (folder / "sens.json").write_text(json.dumps(sens))
    return folder


def run(folder: Path, out: Path, *arguments: str) -> dict:
    assert allocate.main([str(folder / "sens.json"), "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def every_plan(folder: Path, choices: list[str]):
    """(cost, plan) of every plan there is."""
    sens = json.loads((folder / "sens.json").read_text())["matrices"]
    for chosen in itertools.product(choices, repeat=len(sens)):
        named = dict(zip(sens, chosen))
        yield sum(sens[m]["omega"][c] for m, c in named.items()), make_plan(named, {})


@pytest.mark.parametrize("ratio", [5.0, 6.5, 8.0])
def test_the_plan_is_the_best_of_all_that_fit(folder, tmp_path, ratio):
    choices = ["1", "2", "4"]
    size = FileSize.of(Checkpoint.load(folder / "m.safetensors"))
    fitting = sorted(
        ((cost, plan) for cost, plan in every_plan(folder, choices) if size.nbytes(plan) * ratio <= size.fp32_nbytes),
        key=lambda pair: pair[0],
    )
    result = run(folder, tmp_path / "p.json", "--ratio", str(ratio), "--choices", ",".join(choices))
    found = result["allocation"]
    assert dict(Plan.load(tmp_path / "p.json")) == dict(fitting[0][1])
    assert found["cost"] == pytest.approx(fitting[0][0], rel=1e-12)
    assert found["runner_up"]["cost"] == pytest.approx(fitting[1][0], rel=1e-12)
    changed = {m: choice_name(e) for m, e in fitting[1][1].items() if e != fitting[0][1][m]}
    assert found["runner_up"]["changes"] == changed
    assert found["bound"] <= found["cost"] * (1 + 1e-9) and found["ratio"] >= ratio


@pytest.mark.parametrize(
    "arguments", [("--ratio", "6"), ("--random", "3", "--ratio", "6"), ("--uniform", "ternary"), ("--mean-bits", "2.5")]
)
def test_predicted_and_packed_bytes_agree(folder, tmp_path, arguments):
    result = run(folder, tmp_path / "p.json", *arguments)
    out = tmp_path / "m.lowbit"
    assert pack.main([str(folder / "m.safetensors"), "--plan", str(tmp_path / "p.json"), "--out", str(out)]) == 0
    assert out.stat().st_size == result["allocation"]["bytes"]


def test_one_byte_less_is_another_plan(folder, tmp_path):
    """The budget is a ceiling, reached exactly."""
    best = run(folder, tmp_path / "p.json", "--ratio", "6")["allocation"]
    again = run(folder, tmp_path / "q.json", "--bytes", str(best["bytes"]))["allocation"]
    assert again["matrices"] == best["matrices"]
    less = run(folder, tmp_path / "r.json", "--bytes", str(best["bytes"] - 1))["allocation"]
    assert less["bytes"] < best["bytes"] and less["cost"] >= best["cost"]


def test_mean_bits_are_a_ceiling(folder, tmp_path):
    found = run(folder, tmp_path / "p.json", "--mean-bits", "2")["allocation"]
    assert 1.9 < found["mean_bits"] <= 2
    uniform = run(folder, tmp_path / "u.json", "--uniform", "2")["allocation"]
    assert found["predicted"] <= uniform["predicted"]


def test_random_plans_differ_and_fill_the_budget(folder, tmp_path):
    plans = [run(folder, tmp_path / f"{s}.json", "--ratio", "6", "--random", str(s))["allocation"] for s in range(5)]
    budget = FileSize.of(Checkpoint.load(folder / "m.safetensors")).fp32_nbytes / 6
    assert len({json.dumps(p["matrices"]) for p in plans}) == 5
    # Half a percent of the part that the plan decides, which is less than the whole file.
    assert all(0.99 * budget < p["bytes"] <= budget for p in plans)
    again = run(folder, tmp_path / "again.json", "--ratio", "6", "--random", "3")["allocation"]
    assert again == plans[3]


def test_best_is_better_than_its_controls(folder, tmp_path):
    best, inverse = (
        run(folder, tmp_path / "p.json", "--ratio", "6", *more)["allocation"]["predicted"]
        for more in ([], ["--inverse"])
    )
    drawn = [
        run(folder, tmp_path / "p.json", "--ratio", "6", "--random", str(s))["allocation"]["predicted"]
        for s in range(5)
    ]
    assert best < min(drawn) and best < inverse


def test_manual_rules(folder, tmp_path):
    found = run(folder, tmp_path / "p.json", "--manual", "embed=ternary *.attn.[qk]=1 *=4")["allocation"]["matrices"]
    assert found["embed"] == "ternary" and found["layers.0.attn.q"] == "1" and found["layers.0.mlp.fc1"] == "4"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "needs a budget"),
        (["--ratio", "400"], "the smallest one takes"),
        (["--bytes", "100"], "the budget is 100"),
        (["--ratio", "0"], "positive"),
        (["--mean-bits", "0.5"], "1.000 bits"),
        (["--ratio", "6", "--uniform", "2"], "no budget"),
        (["--uniform", "3"], "'3'"),
        (["--uniform", "2,4"], "one precision"),
        (["--manual", "embed=2"], "layers.0.attn.q"),
        (["--manual", "embed"], "PATTERN=CHOICE"),
        (["--random", "-1", "--ratio", "6"], "seed"),
        (["--random", "1", "--ratio", "400"], "no plan fits"),
        (["--ratio", "6", "--choices", "1,16"], "'16'"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, arguments, named):
    assert allocate.main([str(folder / "sens.json"), "--out", str(tmp_path / "p.json"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.update(version=9), "version"),
        (lambda s: s["matrices"].pop("embed"), "exactly"),
        (lambda s: s["matrices"]["embed"]["omega"].update({"2": None}), "matrix 'embed': omega of '2'"),
        (lambda s: s["matrices"]["embed"].pop("squared_error"), "squared_error"),
        (lambda s: s.update(choices=["3"]), "choices"),
        (lambda s: s["file"].pop("config"), "'file'"),
    ],
)
def test_a_damaged_file_is_named(folder, tmp_path, capsys, damage, named):
    sens = json.loads((folder / "sens.json").read_text())
    damage(sens)
    (tmp_path / "sens.json").write_text(json.dumps(sens))
    assert allocate.main([str(tmp_path / "sens.json"), "--ratio", "6", "--out", str(tmp_path / "p.json")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and named in line and "sens.json" in line
