"""tools/search/filesize.py: what is predicted and what `lowbit pack` writes agree to the byte."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.container import write_packed
from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.plan import MatrixPlan, Plan
from lowbit.tools import pack
from lowbit.tools.provenance import PROVENANCE_BYTES, padded, stored_nbytes, unpadded
from lowbit.tools.search.budget import Budget
from lowbit.tools.search.choices import CHOICES, make_plan
from lowbit.tools.search.filesize import FileSize
from lowbit.vocab import Vocab


def checkpoint(**shape) -> Checkpoint:
    torch.manual_seed(0)
    config = ModelConfig(**{"vocab_size": 23, "d_model": 36, "n_layers": 2, "n_heads": 2, "d_ffn": 100} | shape)
    words = ["</s>", "<unk>", "naïve", *(f"word{i}" for i in range(config.vocab_size - 3))]
    return Checkpoint.of_model(TransformerLM(config), Vocab(words), info={"stage": "train", "valid_ppl": 83.2})


SHAPES = [
    {}, {"tied": False, "position": "learned"}, {"norm": "post", "n_layers": 1},
    {"n_layers": 11, "d_model": 64, "d_ffn": 256, "vocab_size": 3000},
]  # fmt: skip


@pytest.fixture(scope="module", params=range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def model(request) -> Checkpoint:
    return checkpoint(**SHAPES[request.param])


def written(model: Checkpoint, plan: Plan, path) -> int:
    packed = pack.pack_checkpoint(model, pack.choose(model, "m", plan, False), {"plan": plan.source})
    write_packed(path, packed)
    return path.stat().st_size


@given(data=st.data())
@settings(max_examples=6)
def test_predicted_bytes_are_the_written_ones(model, tmp_path_factory, data):
    names = list(model.config.matrix_shapes())
    entries = st.sampled_from(
        [*CHOICES.values(), MatrixPlan(4, "pow2"), MatrixPlan(1, None, 64), MatrixPlan(2, None, 64)]
    )
    plan = Plan({name: data.draw(entries) for name in names}, {"method": "drawn"})
    size = FileSize.from_dict(json.loads(json.dumps(FileSize.of(model).to_dict())), "sens.json")
    path = tmp_path_factory.mktemp("size") / "m.lowbit"
    assert size.nbytes(plan) == written(model, plan, path)


def test_additive_bytes_and_the_least_rest_bound_every_plan(model):
    """What the knapsack sees is at most the size, and less than it by a few digits and the padding only."""
    size = FileSize.of(model)
    shapes = model.config.matrix_shapes()
    rest = size.least_rest(Plan.uniform(model.config, 1))
    for i in range(40):
        rng = torch.Generator().manual_seed(i)
        picks = torch.randint(len(CHOICES), (len(shapes),), generator=rng).tolist()
        plan = make_plan({m: list(CHOICES)[p] for m, p in zip(shapes, picks)}, {})
        known = rest + sum(size.additive(m, entry) for m, entry in plan.items())
        # Two offsets a tensor, each at most 2 digits longer than in the smallest plan (8 bits are 8 times 1 bit).
        digits = 2 * 2 * (2 * len(shapes) + len(model.config.vector_shapes()) + 1)
        assert known <= size.nbytes(plan) <= known + digits + 7


def test_free_levels_have_no_size_before_packing(model):
    plan = Plan.uniform(model.config, 2, "free")
    with pytest.raises(LowbitError, match="free levels"):
        FileSize.of(model).nbytes(plan)


def test_a_ratio_is_a_ceiling_to_the_byte(model):
    size = FileSize.of(model)
    budget = Budget.of_ratio(size, 3.0)
    assert budget.nbytes * 3 <= size.fp32_nbytes < (budget.nbytes + 1) * 3


@pytest.mark.parametrize("info", [{}, {"x": 'naïve "q" \\'}, {"x": "y" * 2500}, {"pad": "mine"}])
def test_provenance_fills_whole_blocks(info):
    stored = padded(info)
    assert stored_nbytes(stored) % PROVENANCE_BYTES == 0 and stored_nbytes(stored) > 0
    assert padded(stored) == stored
    assert unpadded(stored) == unpadded(info)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"vocab_packed": 0}, "vocab_packed"), ({"config": {}}, "missing"), ({"more": 1}, "exactly"), (None, "exactly")],
)
def test_damaged_sizes_are_refused(change, named):
    values = FileSize.of(checkpoint()).to_dict()
    with pytest.raises(LowbitError, match=named):
        FileSize.from_dict(None if change is None else values | change, "sens.json")
