"""tools/sensitivity.py: traces against exact ones, KL by hand, stopping, resume, processes, bad input."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import train_tiny, write_data
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.tools import sensitivity
from lowbit.tools.search.curvature import fisher, hutchinson
from lowbit.tools.search.estimators import spearman
from lowbit.tools.search.kl import holding
from lowbit.tools.search.rounds import standard_error
from lowbit.tools.training.data import Batch

SEEDS = range(20)


def exact_traces(loss_of, weights) -> list[float]:
    """Trace of every diagonal block of the Hessian, second derivative by second derivative."""
    gradients = torch.autograd.grad(loss_of(), weights, create_graph=True)
    traces = []
    for g, w in zip(gradients, weights):
        flat = g.reshape(-1)
        rows = [torch.autograd.grad(flat[i], w, retain_graph=True)[0].reshape(-1)[i] for i in range(len(flat))]
        traces.append(float(torch.stack(rows).sum()))
    return traces


def probes(loss_of, weights, seed: int, count: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return np.stack([hutchinson(loss_of(), weights, generator).numpy() for _ in range(count)])


def fifty_parameters():
    """A network of 50 parameters in three groups, and its loss on 40 points; fp64, so that only sampling errs."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    x, y = torch.randn(40, 5).double(), torch.randn(40, 1).double()
    weights = [net[0].weight, net[2].weight, net[3].weight]
    assert sum(p.numel() for p in net.parameters()) == 50
    return weights, lambda: (net(x) - y).square().mean()


def quadratic():
    """1/2 w^T A w with a dense A over two groups: the trace of each block is known."""
    torch.manual_seed(5)
    a = torch.randn(12, 12).double()
    a = a + a.T
    weights = [nn.Parameter(torch.randn(2, 4).double()), nn.Parameter(torch.randn(4).double())]

    def loss():
        w = torch.cat([p.flatten() for p in weights])
        return 0.5 * w @ a @ w

    return weights, loss, [float(a.diagonal()[:8].sum()), float(a.diagonal()[8:].sum())]


@pytest.mark.parametrize("seed", SEEDS)
def test_hutchinson_on_fifty_parameters_is_within_three_standard_errors(seed):
    weights, loss_of = fifty_parameters()
    exact = np.array(exact_traces(loss_of, weights))
    samples = probes(loss_of, weights, seed, 200)
    assert (np.abs(samples.mean(0) - exact) <= 3 * standard_error(samples)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_hutchinson_on_a_quadratic_is_within_three_standard_errors(seed):
    weights, loss_of, exact = quadratic()
    samples = probes(loss_of, weights, seed, 200)
    assert (np.abs(samples.mean(0) - np.array(exact)) <= 3 * standard_error(samples)).all()


def test_hutchinson_is_exact_where_the_hessian_is_diagonal():
    """Signs square to one: the estimate of a diagonal matrix has no variance."""
    w = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    scale = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    value = hutchinson((scale * w.square()).sum() / 2, [w], torch.Generator().manual_seed(0))
    assert float(value) == pytest.approx(36.0)


class Bigram(nn.Module):
    """Logits of the next token are a row of a matrix: the Fisher trace of a token has a closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    @property
    def output_weight(self):
        return self.weight

    def forward(self, tokens):
        return self.weight[tokens]


def test_fisher_is_that_of_the_models_own_labels():
    """E ||p - onehot(y)||^2 = 1 - ||p||^2 with y from p, averaged over tokens; standard errors over 800 samples."""
    torch.manual_seed(0)
    model, tokens = Bigram(), torch.tensor([[0, 1, 2, 3, 0, 2]])
    batch = Batch(tokens, torch.tensor([[1, 2, 0, 1, -100, -100]]))
    generator = torch.Generator().manual_seed(1)
    samples = np.stack([fisher(model, [model.weight], batch, generator).numpy() for _ in range(800)])
    p = model.weight.detach()[tokens[0, :4]].softmax(-1)
    exact = float((1 - p.square().sum(-1)).mean())
    assert abs(samples.mean() - exact) < 4 * float(standard_error(samples)[0])
    assert (samples >= 0).all()


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks (0.5, 0.5, 2, 3) and (0, 1, 2, 3): 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


# The stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sens")
    write_data(folder)
    train_tiny(folder, rare_to_unk=0.0)
    return folder


def argv(trained: Path, metric: str, out: Path, *more: str) -> list[str]:
    start = [str(trained / "fp.safetensors"), "--data", str(trained / "data"), "--metric", metric, "--out", str(out)]
    return [*start, "--threads", "1", "--ratio", "5", *more]


def run(trained: Path, metric: str, out: Path, *more: str) -> dict:
    assert sensitivity.main(argv(trained, metric, out, *more)) == 0
    return json.loads(out.read_text())


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    """Two results agree but for their times and, within ``tolerance``, for the rounding of their numbers."""
    assert a["samples"] == b["samples"] and a["stopped_by"] == b["stopped_by"]
    for name, row in a["matrices"].items():
        for choice, value in row["omega"].items():
            assert b["matrices"][name]["omega"][choice] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("metric", ["hessian", "fisher", "kl"])
def test_every_metric(trained, tmp_path, metric, capsys):
    result = run(
        trained,
        metric,
        tmp_path / "s.json",
        "--samples",
        "2",
        "4",
        "--check",
        "4",
        "--check-tokens",
        "500",
        "--tokens",
        "64",
    )
    assert result["metric"] == metric and set(result["matrices"]) == set(
        Checkpoint.load(trained / "fp.safetensors").config.matrix_shapes()
    )
    for row in result["matrices"].values():
        errors = list(row["squared_error"].values())
        assert errors == sorted(errors, reverse=True), "more bits, less error"
        assert all(se >= 0 for se in row["omega_standard_error"].values())
    assert all(-1 <= result["check"][name] <= 1 for name in ("spearman", "spearman_even"))
    assert not (tmp_path / "s.json.resume").exists()
    assert "stopped by" in capsys.readouterr().out


def test_omega_is_half_the_mean_trace_times_the_error(trained, tmp_path):
    result = run(trained, "fisher", tmp_path / "s.json", "--samples", "2", "3")
    shapes = Checkpoint.load(trained / "fp.safetensors").config.matrix_shapes()
    for name, row in result["matrices"].items():
        n, k = shapes[name]
        for choice, omega in row["omega"].items():
            assert omega == pytest.approx(0.5 * row["trace"] / (n * k) * row["squared_error"][choice], rel=1e-9)


def test_kl_of_one_matrix_is_that_of_the_definition(trained, tmp_path):
    """The first context by hand: P and Q from two models, on the text of the first sample."""
    from lowbit.tools.search.choices import images, matrix_parameters
    from lowbit.tools.search.estimators import Kl, Text
    from lowbit.tools.search.start import load_full_precision
    from lowbit.tools.training.start import Corpora

    checkpoint, config = load_full_precision(trained / "fp.safetensors")
    model = checkpoint.build_model()
    weights = matrix_parameters(model, checkpoint.config)
    text = Text(Corpora.read(str(trained / "data"), config, checkpoint.vocab).train, 64, 1)
    estimator = Kl(model, weights, ["1", "4"], text)
    name = "layers.1.mlp.fc1"
    batch = text[0]
    valid = batch.targets != -100
    with torch.no_grad():
        p = model(batch.tokens)[valid].double().softmax(-1)
        with holding(weights, {name: images(weights[name].data, ["1"])["1"]}):
            q = model(batch.tokens)[valid].double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    measured = estimator.sample(0)[list(weights).index(name), 0, 0]
    assert measured == pytest.approx(expected, rel=1e-4)  # fp32 log-probabilities


def test_negative_trace_falls_back_to_fisher_aloud(trained, tmp_path, monkeypatch, capsys):
    from lowbit.tools.search import estimators

    def minus_one_first(loss, weights, generator):
        values = hutchinson(loss, weights, generator)
        values[0] = -abs(values[0])
        return values

    monkeypatch.setattr(estimators, "hutchinson", minus_one_first)
    result = run(trained, "hessian", tmp_path / "s.json", "--samples", "2", "4")
    first = result["matrices"]["embed"]
    assert first["estimator"] == "fisher" and first["hessian_trace"] < 0 < first["trace"]
    assert all(value > 0 for value in first["omega"].values())
    assert result["matrices"]["layers.1.mlp.fc2"]["estimator"] == "hessian"
    assert "the Fisher's is used: embed" in capsys.readouterr().err


def test_stops_when_standard_errors_are_small(trained, tmp_path):
    result = run(trained, "fisher", tmp_path / "s.json", "--samples", "4", "64", "--standard-error", "0.5")
    assert result["stopped_by"] == "standard error" and result["samples"] < 64
    assert result["largest_relative_error"] < 0.5


def test_killed_it_ends_as_uninterrupted(trained, tmp_path, monkeypatch):
    more = ("--samples", "20", "20")
    whole = run(trained, "hessian", tmp_path / "whole.json", *more)
    from lowbit.tools.training.loop import Resume

    calls = iter(range(1, 100))

    def stop_first(self):
        self._stop = next(calls) == 1
        return self._stop

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "due", stop_first)
        assert sensitivity.main(argv(trained, "hessian", tmp_path / "killed.json", *more)) == 130
    assert (tmp_path / "killed.json.resume").exists() and not (tmp_path / "killed.json").exists()
    killed = run(trained, "hessian", tmp_path / "killed.json", *more)
    same(whole, killed)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(trained: Path, folder: Path, metrics: tuple[str, ...], more: tuple[str, ...]) -> None:
    """What torchrun does, without its launcher; both processes run the stage for every metric in turn."""
    calls = {free_port(): argv(trained, m, folder / f"{m}.json", "--samples", "6", "6", *more) for m in metrics}
    code = (
        f"import os\nfrom lowbit.tools import sensitivity\nfor port, argv in {calls!r}.items():\n"
        "    os.environ['MASTER_PORT'] = port\n    assert sensitivity.main(argv) == 0"
    )
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | common | {"RANK": str(rank)},
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [child.communicate(timeout=100)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], errors


def test_two_processes_give_the_same(trained, tmp_path):
    more = ("--tokens", "64")
    metrics = ("hessian", "kl")
    two_processes(trained, tmp_path, metrics, more)
    for metric in metrics:
        alone = run(trained, metric, tmp_path / "alone.json", "--samples", "6", "6", *more)
        # The same samples in the same order: whatever differs is the rounding of another process's arithmetic.
        same(alone, json.loads((tmp_path / f"{metric}.json").read_text()), tolerance=1e-6)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--samples", "1", "4"], "LEAST"),
        (["--tokens", "0"], "--tokens"),
        (["--agreement", "1.5"], "--agreement"),
        (["--choices", "1,3"], "'3'"),
        (["--choices", "1,1"], "twice"),
        (["--ratio", "1000"], "--ratio 1000"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, more, named):
    assert sensitivity.main(argv(trained, "hessian", tmp_path / "s.json", *more)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lowbit sensitivity: ")]
    assert len(lines) == 1 and named in lines[0]
    assert not list(tmp_path.iterdir())
