"""QuantLinear and QuantEmbedding."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbit import LowbitError, QuantEmbedding, QuantLinear, linear, ops, quantize
from lowbit.ops import packed


@pytest.fixture
def q():
    return quantize(torch.randn(30, 70, generator=torch.Generator().manual_seed(0)), 4)


def test_linear_is_the_function(q):
    x, bias = torch.randn(2, 5, 70), torch.randn(30)
    for compute in ("int8", "exact"):
        layer = QuantLinear(packed(q), bias, compute)
        assert torch.equal(layer(x), linear(x, q, bias, compute))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_tied_embedding_is_the_output_layer_too(q):
    x, ids = torch.randn(2, 70), torch.tensor([[3, 29], [0, 3]])
    for compute in ("int8", "exact"):
        embed = QuantEmbedding(packed(q), compute)
        assert torch.equal(embed(ids), q.dequantize()[ids])
        assert torch.equal(embed.project(x), linear(x, q, None, compute))


def test_repr_tells_bits_table_and_kernel(q):
    text = repr(QuantLinear(packed(q), torch.zeros(30)))
    for part in ("in=70", "out=30", "bits=4", "table=[-15,", "group=70", "bias=True", f"'{ops.isa()} 4-bit small'"):
        assert part in text
    lookup = packed(quantize(torch.randn(16, 64), 2, table="pow2"))
    lookup = packed(quantize(torch.randn(16, 64), 4, table="pow2")) if not lookup.lookup else lookup
    assert "lookup" in repr(QuantLinear(lookup))
    assert "exact" in repr(QuantLinear(packed(q), compute="exact"))
    assert "table=[code-128]" in repr(QuantEmbedding(packed(quantize(torch.randn(4, 8), 8))))


def test_wrong_arguments_are_named(q):
    with pytest.raises(LowbitError, match="compute must be one of int8, exact"):
        QuantLinear(packed(q), compute="fast")
    with pytest.raises(LowbitError, match="compute must be one of int8, exact"):
        QuantEmbedding(packed(q), compute="fast")
    with pytest.raises(LowbitError, match=r"bias \[29\] does not fit the weight \[30, 70\]"):
        QuantLinear(packed(q), torch.zeros(29))


def test_compiles_without_a_graph_break(q):
    layer = QuantLinear(packed(q), torch.randn(30))
    x = torch.randn(3, 70)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
