"""tools/admm.py: exact residual, lossless packing of every table, resume in every phase, bad input."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_training import CONFIG, MODEL, stop_at, train_tiny, write_data

from lowbit.checkpoint import METADATA_KEY, Checkpoint
from lowbit.container import read_packed
from lowbit.errors import LowbitError
from lowbit.plan import MatrixPlan, Plan
from lowbit.tables import find_table
from lowbit.tools import admm, pack
from lowbit.tools.training.admm import AdmmOptions
from lowbit.tools.training.quantized import QuantizedMatrix

# Every table, and groups of 64 along fc2's 128 inputs.
MIXED = {
    "embed": (4, None, None), "layers.0.attn.q": (1, None, None), "layers.0.attn.k": (2, "ternary", None),
    "layers.0.attn.v": (2, "midrise2", None), "layers.0.attn.o": (4, "pow2", None),
    "layers.0.mlp.fc1": (2, "pow2", None), "layers.0.mlp.fc2": (1, None, 64), "layers.1.attn.q": (8, None, None),
    "layers.1.attn.k": (1, None, None), "layers.1.attn.v": (8, None, None), "layers.1.attn.o": (2, "ternary", None),
    "layers.1.mlp.fc1": (4, None, None), "layers.1.mlp.fc2": (2, None, 64),
}  # fmt: skip
OPTIONS = ["--precision", "fp32", "--threads", "1", "--epochs", "2", "--duals", "6"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder with data, fp.safetensors and plan.json; nothing writes to it afterwards."""
    folder = tmp_path_factory.mktemp("admm")
    write_data(folder)
    train_tiny(folder)
    Plan({name: MatrixPlan(*entry) for name, entry in MIXED.items()}).save(folder / "plan.json")
    return folder


def argv(trained: Path, out: Path, *more: str, plan: Path | None = None, checkpoint: Path | None = None) -> list[str]:
    start = [str(checkpoint or trained / "fp.safetensors"), "--plan", str(plan or trained / "plan.json")]
    return [*start, "--data", str(trained / "data"), "--out", str(out), *OPTIONS, *more]


def run(trained: Path, out: Path, *more: str) -> Checkpoint:
    assert admm.main(argv(trained, out, *more)) == 0
    return Checkpoint.load(out)


def assert_on_levels(checkpoint: Checkpoint) -> None:
    """Every weight is a level of its table times its fp16 scale, bit for bit."""
    for name, entry in checkpoint.plan.items():
        weight, scale = checkpoint.tensors[f"{name}.weight"], checkpoint.scales[name].float()
        assert (scale > 0).all()
        group = entry.group or weight.shape[1]
        columns = scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        levels = torch.tensor(find_table(entry.bits, entry.table).levels, dtype=torch.float32)
        assert torch.isin((weight / columns).round(), levels).all(), name
        assert torch.equal((weight / columns).round() * columns, weight), name


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> tuple[Path, Checkpoint]:
    out = tmp_path_factory.mktemp("finished") / "admm.safetensors"
    return out, run(trained, out, "--distill", "0.3")


def test_residual_is_exactly_zero(finished):
    _, checkpoint = finished
    assert checkpoint.residual == 0.0
    assert_on_levels(checkpoint)
    for name in checkpoint.config.vector_shapes():
        vector = checkpoint.tensors[name]
        assert torch.equal(vector, vector.half().float()), f"{name} is more than the packed file holds"


def test_packing_is_lossless_for_every_table(finished, tmp_path):
    path, checkpoint = finished
    assert pack.main([str(path), "--out", str(tmp_path / "m.lowbit")]) == 0
    packed = read_packed(tmp_path / "m.lowbit")
    assert set(packed.matrices) == set(MIXED)
    for name, matrix in packed.matrices.items():
        assert (matrix.bits, matrix.table.name) == (MIXED[name][0], find_table(*MIXED[name][:2]).name)
        assert torch.equal(matrix.scale, checkpoint.scales[name])
        assert torch.equal(matrix.to_quant_tensor().dequantize(), checkpoint.tensors[f"{name}.weight"])
    for name, vector in packed.vectors.items():
        assert torch.equal(vector.float(), checkpoint.tensors[name])


def test_perplexities_of_w_and_of_q_are_logged(finished):
    path, checkpoint = finished
    log = [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]
    both = [r for r in log if "valid_ppl_w" in r]
    assert both and all(1 < r["valid_ppl_w"] <= r["valid_ppl_q"] * 1.5 for r in both)
    assert {r["phase"] for r in log} == {"admm", "hard", "scales"}
    assert all(0 < r["residual"] < 1 and 0 <= r["flips"] <= 1 for r in log if "dual" in r)
    result = checkpoint.info["admm"]
    assert result["valid_ppl"] == log[-1]["valid_ppl_q"] or math.isfinite(result["valid_ppl"])


@pytest.mark.parametrize(
    "more",
    [
        ["--phases", "0", "1", "0"], ["--phases", "1", "0", "1"], ["--extra-gradient"], ["--dropout-scale", "0"],
        ["--method", "straight-through"], ["--method", "admm-only"], ["--method", "admm-only", "--duals", "1"],
        ["--learn-scales"], ["--learn-scales", "--freeze-from", "1", "--lr-scales", "1", "0.5", "0.1"],
    ],
    ids=["hard phase only", "no hard phase", "extra gradient", "no dropout", "straight-through", "ADMM only",
         "one dual update", "learned scales", "never frozen"],
)  # fmt: skip
def test_every_way_ends_on_the_levels(trained, tmp_path, more):
    checkpoint = run(trained, tmp_path / "q.safetensors", "--epochs", "1", *more)
    assert checkpoint.residual == 0.0
    assert_on_levels(checkpoint)


@pytest.mark.parametrize("more", [[], ["--distill", "0.5", "--extra-gradient"]], ids=["plain", "distilled"])
def test_killed_in_every_phase_it_ends_as_uninterrupted(trained, tmp_path, monkeypatch, more, capsys):
    more = [*more, "--phases", "1", "1", "1"]
    whole = run(trained, tmp_path / "whole.safetensors", *more)
    steps = whole.info["admm"]["steps"]
    # Within ADMM, at its very end, within the hard phase and within the scale phase; each counts from the last.
    for step in (5, steps["admm"] - 5, 6, steps["hard"]):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert admm.main(argv(trained, tmp_path / "killed.safetensors", *more)) == 130
        assert not (tmp_path / "killed.safetensors").exists()
    killed = run(trained, tmp_path / "killed.safetensors", *more)
    resumed = [line for line in capsys.readouterr().err.splitlines() if "resuming in phase" in line]
    assert [line.split()[4] for line in resumed] == ["admm", "admm", "hard", "scales"]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, killed.tensors[name]), name
    for name, scale in whole.scales.items():
        assert torch.equal(scale, killed.scales[name]), name
    assert not (tmp_path / "killed.safetensors.resume").exists()


def test_admm_only_ends_on_a_projection(trained, tmp_path):
    """No straight-through step: the result is the best Q among those that ADMM itself validated."""
    checkpoint = run(trained, tmp_path / "q.safetensors", "--method", "admm-only")
    log = [json.loads(line) for line in Path(tmp_path / "q.safetensors.log.jsonl").read_text().splitlines()]
    assert {record["phase"] for record in log} == {"admm"}
    best = min(record["valid_ppl_q"] for record in log if "valid_ppl_q" in record)
    # Vectors are rounded to fp16 after the choice.
    assert checkpoint.info["admm"]["valid_ppl"] == pytest.approx(best, rel=1e-3)


def test_learned_scale_gradient_is_that_of_the_quantizer():
    """Esser et al. 2020, equation 3, against finite differences of Q with rounding held (its straight-through part)."""
    torch.manual_seed(0)
    m = QuantizedMatrix(torch.nn.Parameter(torch.randn(3, 64)), MatrixPlan(2))
    m.start_hard(learn_scales=True)
    m.latent.data[0, :4] = torch.tensor([9.0, -9.0, 0.1, 0.5])
    m.load_quantized(refit=False)
    m.weight.grad = torch.randn(3, 64)
    m.pass_gradient(learn_scales=True)
    s, w = m.scale.double(), m.latent.data.double()
    held = (w / s - m.weight.data.double() / s).detach()  # what rounding and clipping changed, in units of the scale
    inside = (w / s).abs() <= 4  # levels end at 3, and 3 stands for what lies up to 4

    def q(log_scale):
        scale = s * log_scale.exp()
        return torch.where(inside, scale * ((w / s) - held) + (w - scale * (w / s)), scale * (w / s - held))

    zero = torch.zeros_like(s, requires_grad=True)
    (q(zero) * m.weight.grad.double()).sum().backward()
    torch.testing.assert_close(m.log_scale.grad.double(), zero.grad, rtol=1e-4, atol=1e-4)


def test_learned_scales_move_and_rest_once_codes_are_frozen(trained, tmp_path):
    fitted = run(trained, tmp_path / "a.safetensors", "--method", "straight-through", "--freeze-from", "1")
    learned = run(trained, tmp_path / "b.safetensors", "--method", "straight-through", "--freeze-from", "1",
                  "--learn-scales")  # fmt: skip
    assert any(not torch.equal(fitted.scales[m], learned.scales[m]) for m in fitted.scales)


def test_start_from_a_model_of_more_bits(trained, finished, tmp_path):
    """Progressive training: the first weights are the other model's."""
    path, _ = finished
    first = run(trained, tmp_path / "a.safetensors", "--epochs", "0.2", "--start", str(path))
    other = run(trained, tmp_path / "b.safetensors", "--epochs", "0.2")
    assert any(not torch.equal(first.tensors[n], other.tensors[n]) for n in first.tensors)


def test_pull_follows_sensitivity(trained, tmp_path):
    from lowbit.tools import sensitivity
    from lowbit.tools.search.sensitivities import pull_weights

    sens = tmp_path / "sens.json"
    arguments = [str(trained / "fp.safetensors"), "--data", str(trained / "data"), "--metric", "fisher",
                 "--samples", "2", "2", "--ratio", "5", "--threads", "1", "--out", str(sens)]  # fmt: skip
    assert sensitivity.main(arguments) == 0
    config = Checkpoint.load(trained / "fp.safetensors").config
    weights, rows = pull_weights(sens, config), json.loads(sens.read_text())["matrices"]
    order = sorted(weights, key=weights.get)
    trace = {m: rows[m]["trace"] / math.prod(config.matrix_shapes()[m]) for m in rows}
    assert all(0.25 <= v <= 4 for v in weights.values()) and max(weights.values()) > 1 > min(weights.values())
    # Clipped weights tie.
    assert all(trace[a] <= trace[b] or weights[a] == weights[b] for a, b in itertools.pairwise(order))
    assert run(trained, tmp_path / "q.safetensors", "--pull", str(sens)).residual == 0


def test_admm_beats_rounding(trained, tmp_path):
    """What the stage is for: below the perplexity of the same plan after training, by a wide margin."""
    checkpoint = run(trained, tmp_path / "q.safetensors", "--epochs", "4")
    first = next(
        json.loads(line)["valid_ppl_q"]
        for line in Path(tmp_path / "q.safetensors.log.jsonl").read_text().splitlines()
        if "valid_ppl_q" in line
    )
    assert checkpoint.info["admm"]["valid_ppl"] < 0.9 * first


# Bad input


def refused(arguments: list[str], capsys, out: Path) -> str:
    """The one line of a refused run, which left nothing behind."""
    before = sorted(out.parent.iterdir())
    assert admm.main(arguments) == 2
    assert sorted(out.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("admm: ")]
    assert len(lines) == 1 and lines[0].startswith("lowbit admm: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update({"layers.9.attn.q": {"bits": 2}}), "layers.9.attn.q"),
        (lambda m: m.update({"embed": {"bits": 3}}), "embed"),
        (lambda m: m.update({"embed": {"bits": True}}), "embed"),
        (lambda m: m.update({"embed": {"bits": 2, "table": "binary"}}), "binary"),
        (lambda m: m.update({"embed": {"bits": 2, "group": 48}}), "embed"),
        (lambda m: m.pop("layers.0.mlp.fc1"), "layers.0.mlp.fc1"),
        (lambda m: m.clear(), "embed"),
    ],
)
def test_bad_plan(trained, tmp_path, capsys, change, named):
    plan = json.loads((trained / "plan.json").read_text())
    change(plan["matrices"])
    path, out = tmp_path / "bad.json", tmp_path / "q.safetensors"
    path.write_text(json.dumps(plan))
    error = refused(argv(trained, out, plan=path), capsys, out)
    assert "bad.json" in error and named in error


def test_checkpoint_of_another_shape(trained, tmp_path, capsys):
    """A plan for two layers, a checkpoint of one; and a tensor that does not fit its own configuration."""
    out = tmp_path / "q.safetensors"
    other = train_tiny(tmp_path, "other.safetensors", model=MODEL | {"n_layers": 1}, epochs=0.2)
    capsys.readouterr()
    assert "layers.1.attn.q" in refused(argv(trained, out, checkpoint=other), capsys, out)
    with safe_open(str(trained / "fp.safetensors"), framework="pt") as stream:
        metadata = {METADATA_KEY: stream.metadata()[METADATA_KEY]}
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    tensors["layers.1.mlp.fc1.weight"] = tensors["layers.1.mlp.fc1.weight"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "cut.safetensors", metadata)
    error = refused(argv(trained, out, checkpoint=tmp_path / "cut.safetensors"), capsys, out)
    assert "layers.1.mlp.fc1.weight" in error and "[128, 31]" in error


def test_checkpoints_that_admm_cannot_start_from(trained, finished, tmp_path, capsys):
    out = tmp_path / "q.safetensors"
    assert "already quantized" in refused(argv(trained, out, checkpoint=finished[0]), capsys, out)
    assert "no such" in refused(argv(trained, out, checkpoint=tmp_path / "none"), capsys, out)
    (tmp_path / "text").write_text("not a checkpoint")
    assert "text" in refused(argv(trained, out, checkpoint=tmp_path / "text"), capsys, out)
    bare = Checkpoint.load(trained / "fp.safetensors")
    bare.info = {}
    bare.save(tmp_path / "bare.safetensors")
    assert "says nothing of its training" in refused(
        argv(trained, out, checkpoint=tmp_path / "bare.safetensors"), capsys, out
    )


@pytest.mark.parametrize(
    "more",
    [
        ["--epochs", "-1"], ["--lr", "-1"], ["--lr-scales", "1", "0", "1"], ["--freeze-from", "0"],
        ["--phases", "0", "0", "0"], ["--phases", "1", "-1", "1"], ["--distill", "1.5"], ["--duals", "0"],
        ["--kappa", "0.1", "0.01"],
        ["--kappa", "0", "0.01"], ["--dropout-scale", "-1"], ["--out", "/no/such/folder/q.safetensors"],
        ["--epochs", "0"], ["--lr", "nan"], ["--dropout-scale", "20"], ["--epochs", "inf"], ["--seed", "-1"],
    ],
)  # fmt: skip
def test_bad_arguments(trained, tmp_path, capsys, more):
    refused(argv(trained, tmp_path / "q.safetensors", *more), capsys, tmp_path / "q.safetensors")


def test_missing_text(trained, tmp_path, capsys):
    out = tmp_path / "q.safetensors"
    (tmp_path / "empty").mkdir()
    error = refused([*argv(trained, out), "--data", str(tmp_path / "empty")], capsys, out)
    assert "train.txt" in error


# One matrix


def test_the_pull_targets_q_minus_u_and_the_dual_stays_bounded():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 128))
    m = QuantizedMatrix(weight, MatrixPlan(2, None, 64))
    m.set_target()
    assert torch.equal(m.target, m.quantized())
    before = m.squared_residual()[0]
    weight.data.lerp_(m.target, 0.5)
    assert m.squared_residual()[0] == pytest.approx(before / 4, rel=1e-4)
    for _ in range(50):
        m.dual_step(1.0)
    assert m.dual.norm() <= weight.data.norm() * (1 + 1e-6)


def test_straight_through_freezes_stable_codes():
    torch.manual_seed(0)
    m = QuantizedMatrix(torch.nn.Parameter(torch.randn(4, 64)), MatrixPlan(2))
    m.start_hard()
    for _ in range(3):
        flips, frozen = m.track_codes(freeze_after=3)
    assert (flips, frozen) == (0.0, 1.0)
    codes = m._nearest()
    m.weight.grad = torch.ones(4, 64)
    m.pass_gradient()
    assert not m.latent.grad.any()
    m.load_quantized(refit=True)
    assert torch.equal(m._nearest(), codes)


def test_the_scales_gradient_is_the_derivative():
    torch.manual_seed(0)
    m = QuantizedMatrix(torch.nn.Parameter(torch.randn(3, 100)), MatrixPlan(4, None, 64))
    m.start_scales()
    target = torch.randn(3, 100)
    m.weight.grad = m.weight.data - target  # of 1/2 ||Q - target||^2
    m.scale_gradient()
    log_scale = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    units = (m.levels[m.codes.int()].double(), m.first_scale.double())
    columns = (units[1] * log_scale.exp()).repeat_interleave(64, dim=1)[:, :100]
    (0.5 * (units[0] * columns - target.double()).square().sum()).backward()
    assert torch.allclose(m.log_scale.grad.double(), log_scale.grad, rtol=1e-4, atol=1e-4)


def test_options_ramp_kappa_geometrically():
    options = AdmmOptions(duals=5, kappa=(1e-4, 1e-2))
    ramp = [options.kappa_at(i) for i in range(5)]
    assert ramp[0] == pytest.approx(1e-4) and ramp[-1] == pytest.approx(1e-2)
    assert [b / a for a, b in itertools.pairwise(ramp)] == pytest.approx([10**0.5] * 4)
    with pytest.raises(LowbitError, match="kappa"):
        AdmmOptions(kappa=(0.5, 0.1))


def test_tiny_config_is_what_the_tests_say():
    assert CONFIG["model"]["d_ffn"] == 128, "MIXED's groups of 64 need 128 inputs"
