from __future__ import annotations

import json

import pytest
import torch

from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.plan import MatrixPlan, Plan
from lowbit.quantize import quantize

CONFIG = ModelConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ffn=16)


def test_round_trip(tmp_path):
    plan = Plan({"embed": MatrixPlan(8), "layers.0.attn.q": MatrixPlan(2, "ternary", 64)}, {"method": "hand"})
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert dict(loaded) == dict(plan) and loaded.source == plan.source
    assert loaded["embed"] == MatrixPlan(8, "int8")
    assert json.loads((tmp_path / "plan.json").read_text())["matrices"]["embed"] == {"bits": 8, "table": "int8"}


def test_uniform_fits_its_model_and_mean_bits():
    plan = Plan.uniform(CONFIG, 4)
    plan.validate(CONFIG)
    assert plan.mean_bits(CONFIG) == 4.0
    assert Plan.uniform(CONFIG, 2, "ternary").mean_bits(CONFIG) == pytest.approx(1.6)
    assert Plan.uniform(CONFIG, 2, "free").mean_bits(CONFIG) == 2.0
    mixed = Plan({**plan, "embed": MatrixPlan(1)})
    weights = sum(n * k for n, k in CONFIG.matrix_shapes().values())
    assert mixed.mean_bits(CONFIG) == pytest.approx((80 * 1 + (weights - 80) * 4) / weights)


@pytest.mark.parametrize("group", [None, 64, 256])
@pytest.mark.parametrize(
    ("bits", "table"), [(1, None), (2, "ternary"), (2, None), (2, "free"), (4, "free"), (4, "pow2"), (8, None)]
)
def test_nbytes_are_those_of_the_quantized_matrix(bits, table, group):
    q = quantize(torch.randn(5, 131), bits, table, group)
    assert MatrixPlan(bits, table, group).nbytes(5, 131) == q.nbytes


def test_validate_names_the_matrix():
    plan = Plan.uniform(CONFIG, 2)
    with pytest.raises(LowbitError, match=r"p\.json: unknown matrix 'layers\.9\.attn\.q'"):
        Plan({**plan, "layers.9.attn.q": MatrixPlan(2)}).validate(CONFIG, "p.json")
    with pytest.raises(LowbitError, match="no precision for matrix 'embed'"):
        Plan({m: p for m, p in plan.items() if m != "embed"}).validate(CONFIG)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "expected an object"),
        ({"matrices": []}, "expected an object"),
        ({"version": 2, "matrices": {}}, "plan version 2"),
        ({"source": [1], "matrices": {}}, "'source'"),
        ({"matrices": {"embed": 4}}, "'embed' needs 'bits'"),
        ({"matrices": {"embed": {"bits": 4, "tabel": "int8"}}}, "'embed' needs 'bits'"),
        ({"matrices": {"embed": {"bits": 3}}}, "matrix 'embed': bits must be one of"),
        ({"matrices": {"embed": {"bits": True}}}, "matrix 'embed': bits must be one of"),
        ({"matrices": {"embed": {"bits": 4, "table": "ternary"}}}, "matrix 'embed': table 'ternary' has 2 bits"),
        ({"matrices": {"embed": {"bits": 4, "table": ["x"]}}}, "matrix 'embed': unknown table"),
        ({"matrices": {"embed": {"bits": 8, "table": "free"}}}, "matrix 'embed': a free table has 2 or 4 bits, not 8"),
        ({"matrices": {"embed": {"bits": 3, "table": "free"}}}, "matrix 'embed': bits must be one of"),
        ({"matrices": {"embed": {"bits": 4, "group": 65}}}, "matrix 'embed': group"),
        ({"matrices": {"embed": {"bits": 4, "group": 0}}}, "matrix 'embed': group"),
        ({"matrices": {"embed": {"bits": 4, "group": True}}}, "matrix 'embed': group"),
    ],
)
def test_from_dict_refuses(values, reason):
    with pytest.raises(LowbitError, match=reason) as error:
        Plan.from_dict(values, "p.json")
    assert str(error.value).startswith("p.json: ")
