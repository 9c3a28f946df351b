"""What differs between CPUs of one instruction set changes how fast a product is, never its bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_ops import KINDS, random_weight

from lowbit import _C, linear, ops

VBMI = (False, True) if _C.has_vbmi() else (False,)


@pytest.fixture(autouse=True)
def keep_traits():
    before = _C.traits()
    yield
    _C.set_traits(**before)


@pytest.fixture(params=ops.available_isas())
def isa(request):
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


def check_all(x, weight) -> None:
    results = []
    for vbmi, requests in itertools.product(VBMI, (False, True)):
        _C.set_traits(vbmi=vbmi, requests_weights=requests)
        results.append(linear(x, weight))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("bits, table", KINDS)
def test_small_matrices(isa, bits, table, group):
    weight = random_weight(100, 640, bits, table, group)
    for m in (1, 2, 5):
        check_all(torch.randn(m, 640), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_that_come_from_memory(isa, bits):
    """From 2 MiB a thread on, weights are asked for twice."""
    outputs, inputs = 1030, 8 // bits * 4200
    weight = random_weight(outputs, inputs, bits, None)
    for m in (1, 2):
        check_all(torch.randn(m, inputs), weight)


@pytest.mark.skipif(_C.has_vbmi(), reason="this CPU has VBMI")
def test_vbmi_where_there_is_none_is_refused():
    with pytest.raises(RuntimeError, match="this CPU lacks VBMI"):
        _C.set_traits(vbmi=True, requests_weights=True)
