"""tools/nas.py: gradients of the supernet by hand, the size term, resume, the plan, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import stop_at, train_tiny, write_data

from lowbit.checkpoint import Checkpoint
from lowbit.plan import Plan
from lowbit.tools import nas, pack
from lowbit.tools.search.choices import CHOICES, images
from lowbit.tools.search.supernet import Mixture, Sampler, SizeTerm

NAMES = list(CHOICES)


def test_mixture_is_the_weighted_sum_of_the_quantized_matrices():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 64))
    original = weight.data.clone()
    mixture = Mixture(weight, NAMES)
    pi = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    mixture.load(pi)
    expected = sum(p * q for p, q in zip(pi, images(original, NAMES).values()))
    torch.testing.assert_close(weight.data, expected, rtol=1e-5, atol=1e-6)


def test_refreshed_images_follow_the_latent():
    """After a move, one alternating step from the old scales brings each image nearer to the latent."""
    torch.manual_seed(1)
    mixture = Mixture(torch.nn.Parameter(torch.randn(8, 64)), NAMES)
    mixture.latent.data.mul_(1.1)
    old = mixture.images - mixture.latent.data
    mixture.refresh()
    new = mixture.images - mixture.latent.data
    assert (new.flatten(1).norm(dim=1) < old.flatten(1).norm(dim=1)).all()
    before = mixture.images.clone()
    mixture.restore(mixture.state())
    assert torch.equal(before, mixture.images), "a resumed search must go on with the same images"


def test_alpha_gradient_is_that_of_autograd():
    torch.manual_seed(2)
    alpha = torch.nn.Parameter(torch.randn(3, 5))
    sampler = Sampler(alpha, (5.0, 0.3), 1)
    hard, soft = sampler.draw(0.25)
    assert torch.equal(hard, soft)
    again = Sampler(alpha, (5.0, 0.3), 1)
    uniform = torch.rand(3, 5, generator=again.generator)
    expected_soft = ((alpha - (-uniform.log()).log()) / again.temperature(0.25)).softmax(-1)
    torch.testing.assert_close(soft, expected_soft.detach())
    pi_gradient = torch.randn(3, 5)
    (expected_soft * pi_gradient).sum().backward()
    torch.testing.assert_close(sampler.alpha_gradient(soft, pi_gradient), alpha.grad)


def test_second_half_is_rounded_and_cools_down():
    sampler = Sampler(torch.nn.Parameter(torch.zeros(4, 5)), (5.0, 0.3), 1)
    hard, soft = sampler.draw(0.75)
    assert torch.equal(hard.sum(-1), torch.ones(4)) and set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))
    assert sampler.temperature(0) == 5 and sampler.temperature(1) == pytest.approx(0.3)


def test_size_term_pulls_to_the_budget():
    """Without a loss the multiplier alone brings the expected size below the budget, and then falls again."""
    size = SizeTerm(torch.tensor([[1.0, 2.0, 8.0]] * 3, dtype=torch.float64), 4.0, 11.0, 1.0)
    alpha, mu, excesses = torch.nn.Parameter(torch.zeros(3, 3)), 0.0, []
    optimizer = torch.optim.Adam([alpha], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        size.loss(alpha.double().softmax(-1), mu).backward()
        optimizer.step()
        p = alpha.detach().double().softmax(-1)
        mu = size.raised(mu, p, 0.05)
        excesses.append(float(size.excess(p)))
    # (3 * 11/3 + 4) / 11 - 1 = 0.36 at the start.
    assert excesses[0] > 0.3 and excesses[-1] <= 0 <= mu
    assert size.raised(0.0, p, 0.05) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nas")
    write_data(folder)
    train_tiny(folder)
    return folder


def argv(trained: Path, out: Path, *more: str) -> list[str]:
    start = [str(trained / "fp.safetensors"), "--data", str(trained / "data"), "--out", str(out)]
    return [*start, "--precision", "fp32", "--threads", "1", "--ratio", "6", "--epochs", "2", *more]


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "plan.json"
    assert nas.main(argv(trained, out)) == 0
    return out


def test_plan_with_probabilities_and_trajectory(trained, finished, tmp_path):
    found, checkpoint = json.loads(finished.read_text()), Checkpoint.load(trained / "fp.safetensors")
    search = found["search"]
    assert set(search["pi"]) == set(checkpoint.config.matrix_shapes())
    assert all(sum(row.values()) == pytest.approx(1) for row in search["pi"].values())
    steps = [record["step"] for record in search["trajectory"]]
    assert steps == sorted(steps) and len(steps) > 5
    assert all(record["mu"] >= 0 and record["bytes"] > 0 for record in search["trajectory"])
    packed = tmp_path / "m.lowbit"
    assert pack.main([str(trained / "fp.safetensors"), "--plan", str(finished), "--out", str(packed)]) == 0
    assert packed.stat().st_size == search["bytes"] and search["ratio"] >= 6
    assert Plan.load(finished).source == {"method": "nas", "bytes": checkpoint.fp32_nbytes // 6}


def test_killed_it_ends_as_uninterrupted(trained, finished, tmp_path, monkeypatch):
    out = tmp_path / "plan.json"
    for look in (2, 1):
        with monkeypatch.context() as patch:
            stop_at(patch, look)
            assert nas.main(argv(trained, out)) == 130
        assert not out.exists()
    assert nas.main(argv(trained, out)) == 0
    whole, killed = (json.loads(path.read_text()) for path in (finished, out))
    for result in (whole, killed):
        result["search"].pop("seconds")
    assert whole == killed


def test_validation_text_is_never_read(trained, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text((trained / "data" / "train.txt").read_text())
    out = tmp_path / "plan.json"
    assert nas.main([*argv(trained, out, "--epochs", "0.5"), "--data", str(data)]) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--ratio", "500"], "the smallest one takes"),
        (["--held-out", "1"], "--held-out"),
        (["--temperature", "0.1", "5"], "temperatures"),
        (["--epochs", "0"], "--epochs"),
        (["--choices", "x"], "'x'"),
        (["--alpha-every", "0"], "--alpha-every"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, more, named):
    assert nas.main(argv(trained, tmp_path / "plan.json", *more)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lowbit nas: ")]
    assert len(lines) == 1 and named in lines[0]
    assert not list(tmp_path.iterdir())
