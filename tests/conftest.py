"""Fixtures and builders that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

# The tests' tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

# A deadline in milliseconds would fail on a busy machine, not on a defect; the same examples in every run, so
# that a failure in CI is the failure that a developer sees.
settings.register_profile(
    "lowbit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("lowbit")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The corpora: LOWBIT_DATA, or ../shared/data beside the repository; skips where there are none."""
    path = Path(os.environ.get("LOWBIT_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no corpora: {path} does not exist; set LOWBIT_DATA")
    return path


@pytest.fixture
def small_config() -> ModelConfig:
    """Every kind of tensor, ragged sizes: K = 36 is no multiple of 5, 8 or 64."""
    return ModelConfig(
        vocab_size=11, d_model=36, n_layers=2, n_heads=4, d_ffn=132, max_len=8, position="learned", tied=False
    )


def make_vocab(size: int) -> Vocab:
    return Vocab(["</s>", "<unk>", *(f"w{i}" for i in range(size - 3)), "naïve"])


def make_packed(config: ModelConfig, seed: int = 0) -> PackedModel:
    """A packed model that cycles through every table, free levels and groups included."""
    gen = torch.Generator().manual_seed(seed)
    kinds = [
        (1, None, None), (2, "ternary", None), (2, None, 64), (4, None, None), (8, None, 64),
        (2, (-9, -2, 3, 11), None), (4, "pow2", None), (1, None, 64),
    ]  # fmt: skip
    matrices = {}
    for i, (name, shape) in enumerate(config.matrix_shapes().items()):
        bits, table, group = kinds[i % len(kinds)]
        matrices[name] = PackedMatrix.from_quant_tensor(
            quantize(torch.randn(shape, generator=gen), bits, table, group)
        )
    shapes = config.vector_shapes().items()
    vectors = {name: torch.randn(shape, generator=gen).half().float() for name, shape in shapes}
    fp32_nbytes = 4 * config.n_parameters() + 1000
    return PackedModel(config, make_vocab(config.vocab_size), matrices, vectors, fp32_nbytes, {"by": "test"})


@pytest.fixture
def packed_model(small_config: ModelConfig) -> PackedModel:
    return make_packed(small_config)


@pytest.fixture(scope="session")
def pack_random() -> Callable[[ModelConfig], PackedModel]:
    """Builds a packed model of any configuration with random weights."""
    return make_packed
