from __future__ import annotations

import dataclasses
import math

import pytest

from lowbit.config import ModelConfig
from lowbit.errors import LowbitError

BASE = {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ffn": 64, "max_len": 16}


def test_dict_round_trip():
    config = ModelConfig(**BASE, norm="post", activation="relu", position="learned", tied=False, norm_eps=1e-6)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_names_and_shapes():
    config = ModelConfig(**BASE, position="learned", tied=False)
    matrices, vectors = config.matrix_shapes(), config.vector_shapes()
    assert list(matrices)[:3] == ["embed", "layers.0.attn.q", "layers.0.attn.k"]
    assert matrices["embed"] == matrices["head"] == (100, 32)
    assert matrices["layers.1.mlp.fc1"] == (64, 32) and matrices["layers.1.mlp.fc2"] == (32, 64)
    assert vectors["pos.weight"] == (16, 32) and vectors["layers.1.mlp.fc1.bias"] == (64,)
    assert vectors["norm.weight"] == vectors["layers.0.norm2.bias"] == (32,)
    assert len(matrices) == 2 + 2 * 6 and len(vectors) == 1 + 2 * 6 + 2 * 4 + 2


def test_variants_drop_what_they_lack():
    config = ModelConfig(**BASE, norm="post")
    assert "head" not in config.matrix_shapes()
    assert not {"pos.weight", "norm.weight"} & set(config.vector_shapes())


def test_parameter_count():
    config = ModelConfig(**BASE)
    shapes = [*config.matrix_shapes().values(), *config.vector_shapes().values()]
    assert config.n_parameters() == sum(math.prod(s) for s in shapes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"d_model": 32.0}, "d_model"),
        ({"n_layers": True}, "n_layers"),
        ({"n_layers": 10**9}, "n_layers"),
        ({"n_heads": 5}, "multiple of n_heads"),
        ({"d_model": 12, "n_heads": 4}, "even head size"),
        ({"norm": "rms"}, "norm must be one of"),
        ({"norm": []}, "norm must be one of"),
        ({"tied": 1}, "tied"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": 1}, "norm_eps"),
    ],
)
def test_refuses(change, reason):
    with pytest.raises(LowbitError, match=reason):
        ModelConfig(**(BASE | change))


def test_from_dict_refuses():
    values = ModelConfig(**BASE).to_dict()
    with pytest.raises(LowbitError, match="expected an object"):
        ModelConfig.from_dict([1])
    with pytest.raises(LowbitError, match="unknown field 'width'"):
        ModelConfig.from_dict(values | {"width": 1})
    del values["tied"]
    with pytest.raises(LowbitError, match="'tied' is missing"):
        ModelConfig.from_dict(values)


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**BASE).tied = False
