"""`lowbit.linear` on every instruction set of this machine, against fp64 and against an integer-exact model.

Tolerances, u = 2**-24 being fp32's unit roundoff:

* integer model: the int32 sums are exact; an output rounds the conversion of each span's sum, scale * sx, and the
  multiply-add, and the sum over S spans and the bias: (S + 4) u times the sum of magnitudes.
* fp64, exact: partial sums of 512 products, then K / 512 + S of them: (512 + K / 512 + S + 4) u sum |w| |x|.
* fp64, int8: rounding to int8 moves an activation by at most sx / 2 (and a little for 127 / max): 0.501 sx sum |w|.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from lowbit import LowbitError, linear, ops, quantize
from lowbit.ops import _C, packed
from lowbit.quantize import QuantTensor

U = 2.0**-24
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)
KINDS = [(1, None), (2, None), (2, "ternary"), (2, (-9, -2, 3, 11)), (4, None), (4, "pow2"), (8, None)]
SHAPES = [
    (1, 1, None),
    (17, 5, None),
    (33, 100, 64),
    (48, 64, None),
    (100, 129, None),
    (70, 640, 128),
    (16, 1100, None),
]

needs_dlpack = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this PyTorch has no functions of DLPack in C"
)


@pytest.fixture(params=ops.available_isas())
def isa(request):
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


def random_weight(n: int, k: int, bits: int, table, group=None, seed: int = 0) -> QuantTensor:
    """Random codes (every valid one) and scales; no fit, which would take longer than the kernels."""
    gen = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(2, 64, generator=gen), bits, table)
    codes = torch.randint(0, len(q.levels.levels), (n, k), generator=gen, dtype=torch.uint8)
    groups = -(-k // group) if group else 1
    scale = (torch.rand(n, groups, generator=gen) + 0.1).half()
    return QuantTensor(codes, q.table, scale, bits, group or k, q.table_name)


def integer_model(x: torch.Tensor, q: QuantTensor, bias: torch.Tensor):
    """What int8 must give, in fp64; the sum of magnitudes; and sx / 2 * sum |w|."""
    x32, k = x.numpy(), q.shape[1]
    level = q.table.numpy()[q.codes.numpy()].astype(np.int64)
    y = np.tile(bias.numpy().astype(np.float64), (len(x32), 1))
    size, moved = np.abs(y), np.zeros_like(y)
    span = _C.span_of(k, min(q.group, k))
    for s, first in enumerate(range(0, k, span)):
        part, weight = x32[:, first : first + span], level[:, first : first + span]
        top = np.abs(part).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(top > 0, np.rint(part * (np.float32(127) / top)), 0).astype(np.int64)
        sx = (top / np.float32(127)).astype(np.float64)
        scale = q.scale.numpy().astype(np.float64)[:, s * span // min(q.group, k)]
        term = (codes @ weight.T) * scale * sx
        y, size = y + term, size + np.abs(term)
        moved = moved + 0.501 * sx * (np.abs(weight).sum(axis=1) * scale)
    return y, size, moved, -(-k // span)


def run_poisoned(x: torch.Tensor, q: QuantTensor, bias: torch.Tensor | None, exact: bool) -> torch.Tensor:
    """The kernel on an output of NaN between guards: it must write every element and nothing else."""
    m, n, guard = x.shape[0], q.shape[0], 64
    memory = torch.full((m * n + 2 * guard,), float("nan"))
    memory[:guard] = memory[-guard:] = 12345.0
    y = memory[guard : guard + m * n]
    _C.linear(
        packed(q)._native, x.data_ptr(), m, x.stride(0), 0 if bias is None else bias.data_ptr(), y.data_ptr(), exact
    )
    assert bool((memory[:guard] == 12345.0).all() and (memory[-guard:] == 12345.0).all()), "wrote outside"
    return y.view(m, n)


@pytest.mark.parametrize("bits, table", KINDS)
@pytest.mark.parametrize("n, k, group", SHAPES)
def test_both_modes_against_their_models(isa, n, k, group, bits, table):
    q = random_weight(n, k, bits, table, group)
    dq, bias = q.dequantize().double(), torch.randn(n)
    for m in ROWS:
        x = torch.randn(m, k) * 10.0 ** (m % 5 - 2)
        oracle = (x.double() @ dq.T + bias.double()).numpy()
        mass = (x.double().abs() @ dq.abs().T + bias.double().abs()).numpy()
        model, size, moved, spans = integer_model(x, q, bias)

        y = run_poisoned(x, q, bias, exact=False).double().numpy()
        where = f"{isa} M {m}"
        np.testing.assert_array_less(np.abs(y - model), (spans + 4) * U * size + 1e-30, err_msg=where)
        np.testing.assert_array_less(np.abs(y - oracle), moved + 8 * U * mass + 1e-30, err_msg=where)

        y = run_poisoned(x, q, bias, exact=True).double().numpy()
        bound = (512 + k / 512 + spans + 4) * U * mass
        np.testing.assert_array_less(np.abs(y - oracle), bound + 1e-30, err_msg=where)


@pytest.mark.parametrize("bits, table", KINDS)
def test_every_unpack_equals_its_scalar_twin(isa, bits, table):
    """The identity as activations reads every weight alone: fp32 rows must be the dequantized matrix, bit by bit."""
    q = random_weight(40, 100, bits, table)
    eye, dq = torch.eye(100), q.dequantize()
    for rows in (eye, eye[:1], eye[40:42], eye[60:64]):
        expected = (dq @ rows.T).T
        assert torch.equal(linear(rows, q, compute="exact"), expected), isa
        y = linear(rows, q)  # 127 * level, times scale / 127: three roundings
        assert bool(((y - expected).abs() <= 4 * U * expected.abs()).all()), isa


@pytest.mark.parametrize("bits, table", KINDS)
def test_instruction_sets_agree_to_the_last_bit(isa, bits, table):
    """Row scales and no bias: one conversion and one product an output, so nothing may differ."""
    q = random_weight(65, 200, bits, table)
    for m in (1, 3, 7, 40):
        x = torch.randn(m, 200)
        y = linear(x, q)
        ops.set_isa("scalar")
        twin = linear(x, q)
        ops.set_isa(isa)
        assert torch.equal(y, twin), f"{isa} M {m}"


def test_sums_at_the_edge_of_int32(isa):
    """Largest codes times largest activations over a whole span of 65,536, and the split beyond it."""
    for bits, k in itertools.product((1, 4, 8), (65536, 65600)):
        codes = torch.full((17, k), 2**bits - 1, dtype=torch.uint8)
        q = random_weight(17, 64, bits, None)
        q = QuantTensor(codes, q.table, torch.ones(17, 1).half(), bits, k, q.table_name)
        level = int(q.table[-1])
        for x in (torch.ones(1, k), -torch.ones(20, k)):
            y = linear(x, q)
            np.testing.assert_allclose(y.numpy(), level * k * float(x[0, 0]), rtol=8 * U)


@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_strided_unaligned_and_other_dtypes(isa, compute):
    q = random_weight(20, 70, 4, None)
    big = torch.randn(9, 200)
    for x in (big[:, 3:73], big[::2, 1:71], big[:, :140:2], torch.randn(70, 5).T):
        assert torch.equal(linear(x, q, compute=compute), linear(x.clone().contiguous(), q, compute=compute))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = big[:, :70].to(dtype)
        y = linear(x, q, compute=compute)
        assert y.dtype == torch.float32 and torch.equal(y, linear(x.float(), q, compute=compute))
    x = big[:, :70].reshape(3, 3, 70)
    assert torch.equal(linear(x, q, compute=compute), linear(x.view(9, 70), q, compute=compute).view(3, 3, 20))
    assert linear(x[0, 0], q, compute=compute).shape == (20,)


@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_no_rows(isa, compute):
    q = random_weight(20, 70, 2, None)
    assert linear(torch.empty(0, 70), q, compute=compute).shape == (0, 20)
    assert linear(torch.empty(4, 0, 70), q, torch.zeros(20), compute).shape == (4, 0, 20)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_stay_in_their_row(isa, value):
    q = random_weight(20, 128, 4, None, 64)
    for m in (1, 3, 20):
        x = torch.randn(m, 128)
        clean = linear(x, q), linear(x, q, compute="exact")
        x[m - 1, 100] = value
        int8, exact = linear(x, q), linear(x, q, compute="exact")
        assert bool(int8[m - 1].isnan().all()) and not bool(exact[m - 1].isfinite().any())
        assert torch.equal(int8[: m - 1], clean[0][: m - 1]) and torch.equal(exact[: m - 1], clean[1][: m - 1])


def test_tiny_and_zero_rows(isa):
    q = random_weight(20, 64, 4, None)
    bias = torch.randn(20)
    assert torch.equal(linear(torch.zeros(2, 64), q, bias), bias.expand(2, 20))
    assert torch.equal(linear(torch.full((1, 64), 1e-40), q, bias), bias.expand(1, 20))
    assert bool(linear(torch.full((1, 64), 1e-30), q).ne(0).any())


@needs_dlpack
@pytest.mark.parametrize("compute", ops.COMPUTE)
def test_the_usual_call_in_c_gives_the_same_bits(monkeypatch, compute):
    q, gen = random_weight(33, 70, 4, None), torch.Generator().manual_seed(1)
    bias, native = torch.randn(33, generator=gen), ops._linear
    assert native(torch.randn(1, 70), copy.deepcopy(q), None, compute) is None  # not packed yet
    for rows in ((), (3,), (2, 5), (0,), (2, 0)):
        x = torch.randn(*rows, 70, generator=gen)
        for weight, b in itertools.product((q, packed(q)), (None, bias)):
            found = native(x, weight, b, compute)
            assert type(found) is torch.Tensor and found.dtype is torch.float32 and not found.requires_grad
            monkeypatch.setattr(ops, "_linear", lambda *arguments: None)
            expected = linear(x, weight, b, compute)
            monkeypatch.undo()
            assert found.shape == expected.shape and torch.equal(found, expected)
    parameter = torch.nn.Parameter(x)
    assert torch.equal(native(parameter, q, torch.nn.Parameter(bias), compute), native(x, q, bias, compute))


@needs_dlpack
def test_no_other_call_is_made_in_c():
    q, x, bias = random_weight(33, 70, 4, None), torch.randn(3, 70), torch.randn(33)
    packed(q)
    assert ops._linear(x, q, bias, "int8") is not None

    class Other(torch.Tensor):
        pass

    strided = torch.randn(3, 140)[:, ::2]
    for bad in (x.double(), x.half(), strided, x[:, 1:], x[0, 0], x.as_subclass(Other), x.numpy(), None, x.to("meta")):
        assert ops._linear(bad, q, bias, "int8") is None
    for bad in (bias.double(), bias[1:], torch.randn(1, 33), torch.randn(66)[::2], 0.5):
        assert ops._linear(x, q, bad, "int8") is None
    for bad in ("INT8", None, 8):
        assert ops._linear(x, q, bias, bad) is None
    for bad in (None, q.codes, x):
        assert ops._linear(x, bad, bias, "int8") is None


def test_results_are_fp32_whatever_the_default():
    q, x = random_weight(33, 70, 4, None), torch.randn(3, 70)
    expected = linear(x, q), linear(x.double(), q)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(linear(x, q), expected[0]) and torch.equal(linear(x.double(), q), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_are_independent():
    q = random_weight(20, 70, 4, None)
    x = torch.randn(3, 70)
    y = linear(x, q)
    twin = copy.deepcopy(q)
    assert torch.equal(linear(x, twin), y) and packed(twin) is not packed(q)
    twin = copy.deepcopy(q)
    twin.codes.zero_()
    assert not torch.equal(linear(x, twin), y) and torch.equal(linear(x, q), y)


@pytest.mark.parametrize(
    "x, bias, compute, message",
    [
        (torch.zeros(2, 71), None, "int8", r"x \[2, 71\] does not end in K = 70 of the weight \[20, 70\]"),
        (torch.zeros(()), None, "int8", "does not end in K = 70"),
        (torch.zeros(2, 70, dtype=torch.int8), None, "int8", "x must be a float tensor, not torch.int8"),
        (torch.zeros(2, 70), torch.zeros(19), "int8", r"bias \[19\] does not fit"),
        (torch.zeros(2, 70), None, "fp8", "compute must be one of int8, exact, not 'fp8'"),
    ],
)
def test_wrong_arguments_are_named(x, bias, compute, message):
    with pytest.raises(LowbitError, match=message):
        linear(x, random_weight(20, 70, 4, None), bias, compute)


def op_arguments(q: QuantTensor):
    w = packed(q)
    return (w.tiles, w.scales, w.table), (*w.shape, w.bits, w.span)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_opcheck(bits, exact):
    stored, numbers = op_arguments(random_weight(20, 128, bits, None, 64))
    for x, bias in ((torch.randn(3, 128), torch.randn(20)), (torch.randn(2, 2, 128), None)):
        torch.library.opcheck(torch.ops.lowbit.linear.default, (x, *stored, bias, *numbers, exact))


def test_op_checks_what_it_is_given():
    (tiles, scales, table), numbers = op_arguments(random_weight(20, 128, 4, None))
    x = torch.randn(1, 128)
    with pytest.raises(LowbitError, match=r"tiles must be torch.uint8 \[2, 2, 512\]"):
        torch.ops.lowbit.linear(x, tiles[:1], scales, table, None, *numbers, False)
    with pytest.raises(LowbitError, match="no packed weight has 3 bits"):
        torch.ops.lowbit.linear(x, tiles, scales, table, None, 20, 128, 3, 128, False)


def test_compiled_equals_eager():
    q, bias = random_weight(20, 70, 4, None), torch.randn(20)
    compiled = torch.compile(lambda x: linear(x, q, bias).relu(), backend="aot_eager", fullgraph=True)
    linear(torch.zeros(1, 70), q)  # prepacked before tracing
    x = torch.randn(5, 70)
    assert torch.equal(compiled(x), linear(x, q, bias).relu())
