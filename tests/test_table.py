"""The table of precision search: its statistics, its parts, and the whole of it on a corpus of seconds."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, MODEL, write_data

from lowbit.errors import LowbitError
from lowbit.tools import reproduce
from lowbit.tools.pipeline import Pipeline
from lowbit.tools.table_parts.config import TableConfig, tables
from lowbit.tools.table_parts.paired import BLOCK, MARGIN, block_bootstrap, compare, perplexity_interval
from lowbit.tools.table_parts.pictures import front
from lowbit.tools.table_parts.rows import EQUAL_BYTES, first_rows, headline_rows, plans
from lowbit.tools.table_parts.run import Table

TINY = {
    "seeds": [3], "ratio": 3, "budgets": [], "uniform": ["2"], "manual": "embed=4 *=2", "randoms": 1, "epochs": 0.5,
    "lr": 0.005, "distill": 0.2, "hessian": ["--samples", "2", "4", "--check", "4", "--check-tokens", "200"],
    "kl": ["--samples", "2", "2", "--tokens", "64"], "nas": ["--epochs", "0.5"],
    "long": [
        {"epochs": 0.7, "rows": ["best"], "seeds": ["best"]},
        {"epochs": 0.6, "rows": ["fp32-again"], "options": {"less dropout": ["--dropout-scale", "0.3"]}},
    ],
    "trials": {"straight-through, slowly": ["--method", "straight-through", "--lr", "0.001"]},
}  # fmt: skip


# Statistics


def autocorrelated(rng: np.random.Generator, size: int) -> np.ndarray:
    """First-order autoregressive noise, correlation 0.5."""
    noise = rng.normal(size=size)
    for i in range(1, size):
        noise[i] += 0.5 * noise[i - 1]
    return noise


def test_block_bootstrap_has_the_standard_error_of_correlated_text():
    """AR(1) with correlation r: the variance of the mean is sigma^2 (1 + r) / (1 - r) / n, here with sigma^2 = 4/3.

    200 blocks give the standard error to about 5 % (1 / sqrt(2 * 200)); four of these are allowed.
    """
    size = 200 * BLOCK
    values = autocorrelated(np.random.default_rng(0), size)
    expected = math.sqrt(4 / 3 * 3 / size)
    assert block_bootstrap(values).std() == pytest.approx(expected, rel=0.2)


def test_interval_covers_at_its_level():
    """Of 200 texts about 5 % of one-sided bounds miss; 4 standard errors of Binomial(200, .05) are 12 more."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        noise = autocorrelated(rng, 30 * BLOCK)
        missed += compare(noise[None], np.zeros_like(noise)[None]).upper < 0
    assert missed <= 22


def test_non_inferiority_is_a_bound_below_half_a_percent():
    rng = np.random.default_rng(2)
    reference = rng.exponential(size=(1, 80_000))
    noise = 0.2 * rng.normal(size=(1, 80_000))
    noise -= noise.mean()
    # Standard error 0.2 / sqrt(80,000) = 0.0007: the bound lies 0.0012 above the difference.
    assert compare(reference + noise + MARGIN - 0.003, reference).non_inferior
    worse = compare(reference + noise + MARGIN - 0.0005, reference)
    assert not worse.non_inferior and worse.delta == pytest.approx(MARGIN - 0.0005)
    assert worse.low < worse.delta < worse.high


def test_seeds_are_averaged_pair_by_pair():
    reference = np.random.default_rng(3).exponential(size=(3, 5_000))
    found = compare(reference + np.array([[0.0], [0.01], [0.02]]), reference)
    assert found.delta == pytest.approx(0.01) and found.low == pytest.approx(0.01)
    ppl, low, high = perplexity_interval(reference)
    assert low < ppl < high and ppl == pytest.approx(math.exp(reference.mean()))
    with pytest.raises(LowbitError, match="not the same tokens"):
        compare(reference, reference[:2])


def test_front():
    rows = [{"bytes": b, "test_ppl": p} for b, p in ((10, 9.0), (10, 8.0), (20, 8.5), (30, 5.0), (5, 20.0))]
    assert [(r["bytes"], r["test_ppl"]) for r in front(rows)] == [(5, 20.0), (10, 8.0), (30, 5.0)]


# Configurations and rows


@pytest.mark.parametrize("name", sorted(tables()))
def test_named_tables_have_every_row(name):
    config = TableConfig.find(name)
    specs = first_rows(config)
    keys = [s.key for s in specs]
    wanted = {"fp32", "fp32-again", "fp32-distilled", "manual", "hessian", "kl", "nas", "inverse", "ste-only",
              "admm-only", "post-training"}  # fmt: skip
    wanted |= {f"uniform-{c}" for c in ("1", "ternary", "2", "4", "8")} | {f"random-{i}" for i in range(1, 6)}
    assert wanted | {"hessian-8x", "hessian-24x", EQUAL_BYTES} <= set(keys) and len(set(keys)) == len(keys)
    assert len(config.seeds) >= 3
    best = next(s for s in specs if s.key == "nas")
    headline = headline_rows(config, best)
    assert headline[0].key == "nas-seeds" and headline[0].seeds == tuple(config.seeds)
    # Every trained row has the same length; a plan comes from allocate, but nas, and one whose budget another sets.
    assert {s.epochs for s in specs if s.epochs is not None} == {config.epochs}
    assert {s.plan for s in specs if s.plan} - {"nas", EQUAL_BYTES} == set(plans(config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seeds": []}, "seeds"),
        ({"uniform": ["1"]}, "precision 2"),
        ({"uniform": ["3"]}, "'3'"),
        ({"long": [{"epochs": 1}]}, "long"),
        ({"long": [{"epochs": 1, "rows": [], "options": {}}]}, "one title"),
        ({"long": [{"epochs": 1, "rows": ["x"]}]}, "'x'"),
        ({"long": [{"epochs": 1, "rows": ["best"], "seeds": ["uniform-2"]}]}, "seeds: unknown row 'uniform-2'"),
        ({"trials": {"a": "--lr 1"}}, "trials"),
        ({"colour": "red"}, "'colour'"),
    ],
)
def test_bad_configurations_are_named(tmp_path, change, named):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TINY | {"train": "demo"} | change))
    with pytest.raises(LowbitError, match=named) as error:
        TableConfig.find(path)
    assert str(error.value).startswith(str(path))


# The whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data/, train.json and tiny.json."""
    folder = tmp_path_factory.mktemp("table")
    data = write_data(folder, sentences=120)
    (data / "test.txt").write_text((data / "valid.txt").read_text())
    small = {"model": MODEL | {"n_layers": 1}, "epochs": 1, "evals": 2, "rare_to_unk": 0.0}
    (folder / "train.json").write_text(json.dumps(CONFIG | small))
    (folder / "tiny.json").write_text(json.dumps(TINY | {"train": str(folder / "train.json")}))
    return folder


def argv(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(folder / "data"), "--config", str(folder / "tiny.json"), "--out", str(out), *more]


def without_times(value, out: str):
    """The result but for what a clock or the folder's name decides."""
    if isinstance(value, dict):
        return {k: without_times(v, out) for k, v in value.items() if "seconds" not in k}
    if isinstance(value, list):
        return [without_times(v, out) for v in value]
    return value.replace(out, "OUT") if isinstance(value, str) else value


@pytest.fixture(scope="module")
def whole(folder) -> dict:
    (folder / "docs").mkdir()
    (folder / "docs" / "RESULTS.md").write_text("<!-- begin table-tiny -->\n<!-- end table-tiny -->\n")
    assert reproduce.main(argv(folder, folder / "whole", "--docs", str(folder / "docs"))) == 0
    return json.loads((folder / "whole" / "results.json").read_text())


def test_rows_have_sizes_statistics_and_verdicts(folder, whole):
    rows = {row["key"]: row for row in whole["rows"]}
    assert {"fp32", "hessian", "kl", "nas", "random-1", "inverse", "ste-only", "post-training"} <= set(rows)
    assert f"{whole['best']}-long" in rows
    assert rows["fp32-again-long-2"]["title"].endswith("0.6 epochs, less dropout")
    for row in rows.values():
        assert row["test_low"] < row["test_ppl"] < row["test_high"]
        assert row.get("predicted_bytes", row["bytes"]) == row["bytes"], "predicted and packed size differ"
        if row["kind"] not in ("fp32",):
            assert isinstance(row["test_against_fp32"]["non_inferior"], bool)
    searched = [rows[k] for k in ("hessian", "kl", "nas", "random-1", "inverse")]
    assert all(row["ratio"] >= TINY["ratio"] for row in searched)


def test_docs_have_table_and_pictures(folder, whole):
    text = (folder / "docs" / "RESULTS.md").read_text()
    assert "| Hessian 3x |" in text and "Predicted and packed sizes agree to the byte in every row." in text
    assert "| straight-through, slowly | `--method straight-through --lr 0.001` |" in text
    for name in ("", "-bits", "-sensitivity"):
        assert f"results/table-tiny{name}.png" in text
        assert (folder / "docs" / "results" / f"table-tiny{name}.png").read_bytes().startswith(b"\x89PNG")


def test_killed_between_and_within_stages_it_gives_the_same(folder, whole, monkeypatch):
    """Stopped at every fifth new stage, before it or after it has run but before its result is kept."""
    out, original = folder / "killed", Pipeline.once
    calls = {"new": 0}

    def once(self, key, command, work, inputs, outputs):
        def stopping():
            calls["new"] += 1
            if calls["new"] % 10 == 5:
                raise KeyboardInterrupt
            result = work()
            if calls["new"] % 10 == 0:
                raise KeyboardInterrupt
            return result

        return original(self, key, command, stopping, inputs, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "once", once)
        codes = []
        while not codes or codes[-1]:
            codes.append(reproduce.main(argv(folder, out)))
            assert len(codes) < 40
    assert codes.count(130) >= 5
    killed = json.loads((out / "results.json").read_text())
    for result in (whole, killed):
        result.pop("command")
    assert without_times(whole, str(folder / "whole")) == without_times(killed, str(out))


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


def test_two_processes_share_the_stages(folder, whole, two_threads, capfd):
    """Every stage runs once, in one of them. Other numbers of threads round otherwise, which moves perplexity a bit."""
    out = folder / "jobs"
    assert reproduce.main(argv(folder, out, "--jobs", "2")) == 0
    helper = (out / "job-2.log").read_text()
    started = re.findall(r"^\[(\S+)\] lowbit ", capfd.readouterr().err + helper, re.MULTILINE)
    assert len(started) == len(set(started)) == len(whole["commands"])
    assert "] lowbit " in helper, "the second process did nothing"
    found = json.loads((out / "results.json").read_text())
    assert without_times(found["commands"], str(out)) == without_times(whole["commands"], str(folder / "whole"))
    for row, expected in zip(found["rows"], whole["rows"], strict=True):
        assert row["key"] == expected["key"] and row["test_ppl"] == pytest.approx(expected["test_ppl"], rel=0.05)


def test_an_interruption_stops_all_processes(folder, two_threads, monkeypatch):
    """The first process is interrupted as soon as it begins; the second one is in its own start or first stage."""

    def interrupted(self):
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(Table, "run_shared", interrupted)
    assert reproduce.main(argv(folder, folder / "stopped", "--jobs", "2")) == 130
    assert not multiprocessing.active_children()


def test_dry_run_prints_and_writes_nothing(folder, tmp_path, capsys):
    assert reproduce.main(argv(folder, tmp_path / "out", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "admm-hessian-s3" in text and "memory of sensitivity" in text and "steps an epoch" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--skip-control"], "--skip-control"),
        (["--jobs", "1000"], "--jobs 1000"),
        (["--jobs", "0"], "--jobs 0"),
        (["--config", "demo", "--jobs", "2"], "--jobs"),
        (["--config", "unknown"], "--config unknown"),
        (["--config", "demo", "--dry-run"], "--dry-run"),
        (["--data", "/no/such"], "/no/such"),
    ],
)
def test_bad_commands_are_one_line(folder, tmp_path, capsys, more, named):
    assert reproduce.main(argv(folder, tmp_path / "out", *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]
