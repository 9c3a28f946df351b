"""lowbit pack: lossless, refused, projected, post-training; and what bad input says."""

from __future__ import annotations

import json
import os

import pytest
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.container import read_packed
from lowbit.plan import MatrixPlan, Plan
from lowbit.quantize import quantize
from lowbit.tools.admm import main as admm_main
from lowbit.tools.pack import main
from lowbit.vocab import Vocab

KINDS = [(1, None), (2, "ternary"), (2, None), (4, None), (4, "pow2"), (8, None)]


@pytest.fixture
def full(small_config) -> Checkpoint:
    gen = torch.Generator().manual_seed(0)
    shapes = {f"{m}.weight": s for m, s in small_config.matrix_shapes().items()} | small_config.vector_shapes()
    tensors = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    vocab = Vocab(["</s>", "<unk>", *(f"w{i}" for i in range(small_config.vocab_size - 2))])
    return Checkpoint(small_config, vocab, tensors, info={"stage": "test"})


@pytest.fixture
def plan(small_config) -> Plan:
    """Every table, some with groups."""
    return Plan(
        {
            name: MatrixPlan(*KINDS[i % len(KINDS)], 64 if i % 2 else None)
            for i, name in enumerate(small_config.matrix_shapes())
        },
        {"method": "hand"},
    )


@pytest.fixture
def admm(full, plan) -> Checkpoint:
    """What ADMM leaves: every weight a level times its scale."""
    scales = {}
    for name, entry in plan.items():
        q = quantize(full.tensors[f"{name}.weight"], entry.bits, entry.table, entry.group)
        full.tensors[f"{name}.weight"], scales[name] = q.dequantize(), q.scale
    return Checkpoint(full.config, full.vocab, full.tensors, plan, scales, 0.0, {"stage": "admm"})


def run(tmp_path, checkpoint: Checkpoint, *options: str) -> int:
    checkpoint.save(tmp_path / "c.safetensors")
    return main([str(tmp_path / "c.safetensors"), "--out", str(tmp_path / "m.lowbit"), *options])


def refused(tmp_path, capsys, reason: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.startswith("lowbit pack: ") and captured.err.count("\n") == 1 and reason in captured.err
    assert captured.out == ""
    assert not [f for f in os.listdir(tmp_path) if "lowbit" in f]


def test_trained_codes_and_scales_are_packed_without_loss(tmp_path, admm, capsys):
    assert run(tmp_path, admm) == 0
    assert "verified" in capsys.readouterr().out
    model = read_packed(tmp_path / "m.lowbit")
    for name, matrix in model.matrices.items():
        assert torch.equal(matrix.scale, admm.scales[name])
        assert torch.equal(matrix.to_quant_tensor().dequantize(), admm.tensors[f"{name}.weight"])
    for name, vector in model.vectors.items():
        assert torch.equal(vector, admm.tensors[name].half().float())
    assert model.info["method"] == "lossless" and model.info["checkpoint"] == {"stage": "admm"}
    assert model.info["plan"] == {"method": "hand"} and model.fp32_nbytes == admm.fp32_nbytes


def test_packing_twice_gives_the_same_bytes(tmp_path, admm):
    run(tmp_path, admm)
    first = (tmp_path / "m.lowbit").read_bytes()
    run(tmp_path, admm)
    assert (tmp_path / "m.lowbit").read_bytes() == first


@pytest.mark.parametrize("residual", [1e-4, None])
def test_a_residual_is_refused_unless_projected(tmp_path, admm, capsys, residual):
    admm.tensors["embed.weight"] += 1e-3
    admm.residual = residual
    assert run(tmp_path, admm) == 2
    refused(tmp_path, capsys, "--project")
    assert run(tmp_path, admm, "--project") == 0
    model = read_packed(tmp_path / "m.lowbit")
    assert model.info["method"] == "projected"
    error = model.matrices["embed"].to_quant_tensor().dequantize() - admm.tensors["embed.weight"]
    again = quantize(admm.tensors["embed.weight"], admm.plan["embed"].bits)
    assert error.norm() <= (again.dequantize() - admm.tensors["embed.weight"]).norm() * 1.001


def test_a_false_claim_of_residual_0_names_the_matrix(tmp_path, admm, capsys):
    admm.tensors["layers.1.mlp.fc1.weight"][3, 5] += 1e-6
    assert run(tmp_path, admm) == 2
    refused(tmp_path, capsys, "matrix 'layers.1.mlp.fc1': 1 weights (first: row 3, column 5)")


def test_another_plan_than_the_trained_one(tmp_path, admm, capsys):
    Plan.uniform(admm.config, 4).save(tmp_path / "p.json")
    assert run(tmp_path, admm, "--plan", str(tmp_path / "p.json")) == 2
    refused(tmp_path, capsys, "trained for another plan")
    assert run(tmp_path, admm, "--plan", str(tmp_path / "p.json"), "--project") == 0
    assert {m.bits for m in read_packed(tmp_path / "m.lowbit").matrices.values()} == {4}
    admm.plan.save(tmp_path / "same.json")
    assert run(tmp_path, admm, "--plan", str(tmp_path / "same.json")) == 0
    assert read_packed(tmp_path / "m.lowbit").info["method"] == "lossless"


def test_post_training_is_the_least_squares_fit(tmp_path, full, plan):
    plan.save(tmp_path / "p.json")
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json")) == 0
    model = read_packed(tmp_path / "m.lowbit")
    assert model.info["method"] == "post-training"
    for name, matrix in model.matrices.items():
        entry = plan[name]
        expected = quantize(full.tensors[f"{name}.weight"], entry.bits, entry.table, entry.group)
        q = matrix.to_quant_tensor()
        assert torch.equal(q.codes, expected.codes) and torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize("bits", [2, 4])
def test_free_levels_are_learned_by_packing(tmp_path, full, bits):
    Plan.uniform(full.config, bits, "free", 64).save(tmp_path / "p.json")
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json")) == 0
    for name, matrix in read_packed(tmp_path / "m.lowbit").matrices.items():
        expected = quantize(full.tensors[f"{name}.weight"], bits, "free", 64)
        q = matrix.to_quant_tensor()
        assert torch.equal(q.table, expected.table) and torch.equal(q.dequantize(), expected.dequantize())


def test_a_trained_plan_has_no_free_levels(tmp_path, admm, capsys):
    admm.plan = Plan({**admm.plan, "layers.0.attn.v": MatrixPlan(2, "free")})
    assert run(tmp_path, admm) == 2
    refused(tmp_path, capsys, "matrix 'layers.0.attn.v': no training ends on free levels")


def test_admm_refuses_free_levels(tmp_path, full, capsys):
    full.info = {"train_config": {}}
    full.save(tmp_path / "c.safetensors")
    Plan({**Plan.uniform(full.config, 2), "layers.0.mlp.fc1": MatrixPlan(4, "free")}).save(tmp_path / "p.json")
    out = str(tmp_path / "y.safetensors")
    options = ["--plan", str(tmp_path / "p.json"), "--data", str(tmp_path), "--out", out]
    assert admm_main([str(tmp_path / "c.safetensors"), *options]) == 2
    error = capsys.readouterr().err
    assert "p.json: matrix 'layers.0.mlp.fc1': free levels are learned by packing" in error and error.count("\n") == 1


def test_group_option_overrides_the_plan(tmp_path, full):
    Plan.uniform(full.config, 2).save(tmp_path / "p.json")
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json"), "--group", "64") == 0
    matrices = read_packed(tmp_path / "m.lowbit").matrices
    assert matrices["layers.0.mlp.fc2"].scale.shape == (36, 3) and matrices["embed"].scale.shape == (11, 1)


def test_full_precision_without_a_plan(tmp_path, full, capsys):
    assert run(tmp_path, full) == 2
    refused(tmp_path, capsys, "give --plan")
    assert run(tmp_path, full, "--project") == 2
    refused(tmp_path, capsys, "give --plan")


@pytest.mark.parametrize(
    ("matrices", "reason"),
    [
        ({"layers.9.attn.q": {"bits": 2}}, "unknown matrix 'layers.9.attn.q'"),
        ({"embed": {"bits": 3}}, "matrix 'embed': bits must be one of 1, 2, 4, 8, not 3"),
        ({"embed": {"bits": 2}}, "no precision for matrix 'layers.0.attn.q'"),
    ],
)
def test_bad_plans_name_the_matrix(tmp_path, full, capsys, matrices, reason):
    (tmp_path / "p.json").write_text(json.dumps({"matrices": matrices}))
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json")) == 2
    refused(tmp_path, capsys, f"p.json: {reason}")


def test_what_is_no_checkpoint(tmp_path, capsys, full, plan):
    (tmp_path / "text").write_text("hello")
    assert main([str(tmp_path / "text"), "--out", str(tmp_path / "m.lowbit")]) == 2
    refused(tmp_path, capsys, "not a safetensors file")
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "m.lowbit")]) == 2
    refused(tmp_path, capsys, "none: no such checkpoint")
    plan.save(tmp_path / "p.json")
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json")) == 0
    packed = tmp_path / "m.lowbit"
    capsys.readouterr()
    assert main([str(packed), "--out", str(tmp_path / "again.lowbit")]) == 2
    assert "not a lowbit checkpoint" in capsys.readouterr().err and not (tmp_path / "again.lowbit").exists()


def test_a_bias_beyond_fp16(tmp_path, admm, capsys):
    admm.tensors["layers.0.attn.q.bias"][0] = 1e6
    assert run(tmp_path, admm) == 2
    refused(tmp_path, capsys, "'layers.0.attn.q.bias': magnitude 1e+06 does not fit in fp16")


def test_output_folder_must_exist(tmp_path, admm, capsys):
    admm.save(tmp_path / "c.safetensors")
    assert main([str(tmp_path / "c.safetensors"), "--out", str(tmp_path / "no" / "m.lowbit")]) == 2
    refused(tmp_path, capsys, "does not exist")


def test_a_packed_model_has_its_suffix(tmp_path, admm, capsys):
    """What loads a model tells the two kinds of file apart by it."""
    admm.save(tmp_path / "c.safetensors")
    assert main([str(tmp_path / "c.safetensors"), "--out", str(tmp_path / "m.bin")]) == 2
    refused(tmp_path, capsys, "ends in .lowbit")
    assert not (tmp_path / "m.bin").exists()


def test_bad_group(tmp_path, full, plan, capsys):
    plan.save(tmp_path / "p.json")
    assert run(tmp_path, full, "--plan", str(tmp_path / "p.json"), "--group", "7") == 2
    refused(tmp_path, capsys, "multiple of 64")


def test_json(tmp_path, admm, capsys):
    assert run(tmp_path, admm, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    size = os.path.getsize(tmp_path / "m.lowbit")
    assert result["nbytes"] == size and result["ratio"] == admm.fp32_nbytes / size
    assert sum(k["matrices"] for k in result["kinds"]) == len(admm.plan)
    assert all(k["relative_error"] == 0 for k in result["kinds"])
    # fp16 rounding is at most 2^-11 of a value, and N(0, 1) samples stay below 8.
    assert 0 < result["fp16_vector_error"] <= 8 * 2.0**-11
    assert "times smaller" in captured.err
