"""tools/training/native.py: training's row kernels against fp64, and bit for bit against PyTorch's operations."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbit import LowbitError, ops
from lowbit.quantize import fit, round_scale
from lowbit.tables import TABLES, free_table
from lowbit.tools.training import native
from lowbit.tools.training.tile_layers import TileLinear, use_tiles

EPS = 2.0**-24
FREE = free_table((-100, -31, 5, 127), 2)
ALL_TABLES = [*TABLES.values(), FREE]


@pytest.fixture(params=ops.available_isas())
def isa(request):
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


def oracle(logits, target, teacher, distill):
    """Summed loss, summed NLL and the loss's gradient, by autograd in fp64."""
    x = logits.double().requires_grad_()
    log_p = x.log_softmax(1)
    nll = -log_p.gather(1, target[:, None]).sum()
    loss = nll
    if teacher is not None:
        log_q = teacher.double().log_softmax(1)
        loss = (1 - distill) * nll + distill * (log_q.exp() * (log_q - log_p)).sum()
    loss.backward()
    return loss.detach(), nll.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distill", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("m,v", [(1, 1), (3, 15), (5, 16), (7, 37), (40, 1000)])
def test_softmax_gradient_is_the_oracle(isa, m, v, distill, dtype):
    gen = torch.Generator().manual_seed(m)
    logits = (torch.randn(m, v, generator=gen) * 4).to(dtype)
    teacher = None if distill is None else (torch.randn(m, v, generator=gen) * 4).to(dtype)
    target = torch.randint(v, (m,), generator=gen)
    loss64, nll64, grad64 = oracle(logits, target, teacher, distill or 0.0)
    kept = logits.clone()
    loss, nll = native.softmax_gradient(kept, target, teacher, distill or 0.0, gradient=False)
    assert torch.equal(kept, logits)
    again = native.softmax_gradient(kept, target, teacher, distill or 0.0, gradient=True)
    assert torch.equal(torch.stack(again), torch.stack([loss, nll]))
    # exp is right to 3e-7 + 1e-7 |x|, |x| < 40 the span of the logits; a sum of V terms adds V / 16 + 16 roundings.
    relative = 3e-7 + 40e-7 + (v / 16 + 20) * EPS
    assert abs(nll - nll64) <= m * (relative + 60 * EPS)
    assert abs(loss - loss64) <= m * (3 * relative + 200 * EPS)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2 * EPS  # of the stored gradient
    bound = (2 * relative) * 2 + rounding * grad64.abs() + 1e-37
    assert ((kept.double() - grad64).abs() <= bound).all()


def test_a_row_does_not_depend_on_the_others_or_on_threads():
    gen = torch.Generator().manual_seed(0)
    logits, target = torch.randn(64, 999, generator=gen), torch.randint(999, (64,), generator=gen)
    whole, alone = logits.clone(), logits[17:18].clone()
    native.softmax_gradient(whole, target, None, 0.0, gradient=True)
    native.softmax_gradient(alone, target[17:18], None, 0.0, gradient=True)
    assert torch.equal(whole[17:18], alone)
    ops.set_threads(2)
    try:
        again = logits.clone()
        native.softmax_gradient(again, target, None, 0.0, gradient=True)
    finally:
        ops.set_threads(None)
    assert torch.equal(whole, again)


def test_extremes_and_nothing(isa):
    logits = torch.tensor([[80.0, -1e38, -80.0], [0.0, float("nan"), 0.0]])
    loss, nll = native.softmax_gradient(logits, torch.tensor([0, 0]), None, 0.0, gradient=True)
    assert nll.isnan() and logits[1].isnan().all()
    assert logits[0].tolist() == pytest.approx([0, 0, 0], abs=1e-30)
    loss, _ = native.softmax_gradient(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), None, 0.0, True)
    assert loss == 0


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_beyond_the_vocabulary_are_refused(target):
    with pytest.raises(LowbitError, match="targets must lie in 0"):
        native.softmax_gradient(torch.zeros(2, 5), torch.tensor([0, target]), None, 0.0, gradient=True)


def test_what_does_not_suit_is_refused():
    x = torch.zeros(4, 6)
    assert native.suits(x, None) and native.suits(x.bfloat16())
    assert not native.suits(x.T) and not native.suits(x, x.bfloat16()) and not native.suits(x.double())
    assert not native.suits(torch.empty(2, 2, device="meta"))
    with pytest.raises(LowbitError, match="softmax_gradient"):
        native.softmax_gradient(x.T, torch.zeros(6, dtype=torch.int64), None, 0.0, gradient=True)
    with pytest.raises(LowbitError, match="one scale a row"):
        native.Quantizer(TABLES["binary"], 6).load(x, torch.ones(4, 2), x)


def matrix(n, k, group, table):
    gen = torch.Generator().manual_seed(n + k)
    v = torch.randn(n, k, generator=gen)
    scale = fit(v, table, group)[1].float()
    v[0, 0], v[-1, -1] = 1e30, -1e30
    v[:, 1] = scale[:, 0] * ((table.levels[0] + table.levels[1]) / 2)  # on a boundary
    return v, scale


def columns(scale, group, k):
    return scale.repeat_interleave(group or k, dim=1)[:, :k]


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda t: t.name)
@pytest.mark.parametrize("n,k,group", [(5, 67, None), (3, 200, 64), (200, 128, 128)])
def test_nearest_levels_are_those_of_pytorch(isa, table, n, k, group):
    v, scale = matrix(n, k, group, table)
    out = torch.empty_like(v)
    native.Quantizer(table, group or k).load(v, scale, out)
    s = columns(scale, group, k)
    levels = torch.tensor(table.levels, dtype=torch.float32)
    if table.affine:
        a, b = table.affine
        bottom, top = (1, 255) if table.name == "int8" else (0, len(levels) - 1)
        step = s * a
        expected = (v * (1 / step)).add_(-b / a).round_().clamp_(bottom, top).add_(b / a).mul_(step)
    else:
        expected = levels[torch.bucketize(v / s, (levels[1:] + levels[:-1]) / 2)] * s
    assert torch.equal(out, expected)
    # And no other level is nearer, but for the rounding of a quotient at a boundary.
    usable = levels[1:] if table.name == "int8" else levels
    distance = (v.double()[..., None] - s.double()[..., None] * usable.double()).abs().amin(-1)
    assert ((v.double() - out.double()).abs() <= distance + 8 * EPS * (v.double().abs() + 256 * s)).all()


# Binary and ternary scales have closed forms, which lowbit.quantize solves.
@pytest.mark.parametrize("table", [t for t in ALL_TABLES if t.name not in ("binary", "ternary")], ids=lambda t: t.name)
@pytest.mark.parametrize("n,k,group", [(5, 67, None), (3, 200, 64)])
def test_refined_scales_are_the_fits(isa, table, n, k, group):
    gen = torch.Generator().manual_seed(7)
    v = torch.randn(n, k, generator=gen)
    start = round_scale(fit(v, table, group)[1].float() * 1.15)
    refined = native.Quantizer(table, group or k).refine(v, start, 2)
    _, expected = fit(v, table, group, start=start, refine_only=True, iterations=2)
    # Sums in another order: fp16 scales may differ in the last place.
    torch.testing.assert_close(refined, expected.float(), rtol=2.0**-10, atol=0)


def test_a_row_of_zeros_keeps_its_scale():
    start = torch.full((2, 1), 0.5)
    refined = native.Quantizer(TABLES["midrise4"], 8).refine(torch.zeros(2, 8), start, 3)
    assert torch.equal(refined, start)


# Products on bf16 tiles

tiles = pytest.mark.skipif(not native.has_bf16_tiles(), reason="needs a CPU with bf16 tiles (Intel AMX)")
SHAPES = [(1, 32, 32), (16, 32, 64), (33, 64, 96), (48, 96, 32), (37, 1000, 64), (300, 2500, 96), (77, 96, 2112)]


def bf16_rows(m, n):
    """Random values in rows as the products read them."""
    return native.padded_rows(m, n).copy_(torch.randn(m, n))


@tiles
@pytest.mark.parametrize("m,n,k", SHAPES)
def test_products_on_tiles_are_the_oracle(m, n, k):
    torch.manual_seed(m + n + k)
    x, weight, bias, grad = torch.randn(m, k).bfloat16(), torch.randn(n, k), torch.randn(n), bf16_rows(m, n)
    y = native.linear(x, weight, bias, native.padded_rows(m, n))
    grad_x, grad_weight, grad_bias = native.linear_gradients(grad, x, weight)
    w64, x64, g64 = weight.bfloat16().double(), x.double(), grad.double()
    for got, left, right, shift in (
        (y, x64, w64.T, bias.double()),
        (grad_x, g64, w64, 0.0),
        (grad_weight, g64.T, x64, 0.0),
        (grad_bias, g64.T, torch.ones(m, 1, dtype=torch.float64), 0.0),
    ):
        exact = left @ right + shift
        # Products of bf16 are exact in fp32; a sum of K terms has K roundings, and a bf16 result one of 2^-9 more.
        bound = (left.shape[1] + 2) * EPS * (left.abs() @ right.abs() + 8)
        bound = bound + (2.0**-8 * exact.abs() if got.dtype == torch.bfloat16 else 0)
        assert ((got.double().view_as(exact) - exact).abs() <= bound).all()


@tiles
def test_products_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(130, 96).bfloat16(), torch.randn(160, 96), bf16_rows(130, 160)

    def products():
        return native.linear(x, weight, None, native.padded_rows(130, 160)), *native.linear_gradients(grad, x, weight)

    alone = products()
    ops.set_threads(2)
    try:
        together = products()
    finally:
        ops.set_threads(None)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@tiles
def test_layers_on_tiles_are_the_layers_of_autocast():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32, bias=False))
    fast = use_tiles(copy.deepcopy(plain))
    assert type(fast[0]) is TileLinear and list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 7, 64)
    assert torch.equal(fast(x), plain(x))  # outside of autocast a layer is what it was
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, at in zip((plain, fast), inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(at).float().square().sum()
        loss.backward()
    pairs = [(inputs[0].grad, inputs[1].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(plain.parameters(), fast.parameters(), strict=True)]
    for a, b in pairs:
        assert b.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * a.norm()  # a few roundings to bf16, 2^-9 each, on the way


def test_widths_without_tiles_fall_back_to_pytorch():
    layer = use_tiles(torch.nn.Sequential(torch.nn.Linear(20, 30)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 20)).shape == (4, 30)
