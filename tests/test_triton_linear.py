"""The Triton kernels against an fp64 oracle: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from lowbit import quantize
from lowbit.errors import LowbitError
from lowbit.kernels import GpuWeight, KernelConfig, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


with pytest.MonkeyPatch.context() as environment:
    if DEVICE == "cpu":
        # Triton decides at its first import whether kernels are interpreted: now, at collection, before a test of
        # torch.compile imports it.
        environment.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'lowbit[gpu]'")
if DEVICE == "cpu" and isinstance(triton.language.sum, triton.JITFunction):
    pytest.skip("Triton was imported without TRITON_INTERPRET=1 before these tests", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def interpreter_switch():
    """Kernels read the variable again when they are defined and while they run; other tests must not see it."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


GUARD = 64  # elements on both sides of an output
SENTINEL = 777.0
# (bits, table)
TABLES = [
    (1, None), (2, "ternary"), (2, None), (2, "pow2"), (2, (-9, -2, 3, 11)), (4, None), (4, "pow2"), (8, None),
]  # fmt: skip
SHAPES = [(37, 200), (1, 1), (70, 129), (16, 320), (65, 63)]  # N, K
ROWS = [1, 3, 16, 17, 33]


@pytest.fixture
def guarded(monkeypatch):
    """Every buffer the launcher allocates starts as NaN, between guards; they are intact at the end.

    Yields the list of these buffers, without the guards.
    """
    buffers, inner, empty = [], [], torch.empty

    def poisoned(*shape, dtype=None, device=None):
        if device is None or not isinstance(shape[0], tuple):  # not the launcher
            return empty(*shape, dtype=dtype, device=device)
        (shape,) = shape
        size = torch.Size(shape).numel()
        whole = empty(size + 2 * GUARD, dtype=dtype, device=device).fill_(SENTINEL)
        buffers.append(whole)
        inner.append(whole[GUARD : GUARD + size].fill_(torch.nan).view(shape))
        return inner[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    yield inner
    monkeypatch.undo()
    for whole in buffers:
        assert bool((whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all()), "write out of bounds"


def surrounded(t: torch.Tensor, value: float) -> torch.Tensor:
    """A contiguous copy of ``t`` on the device with ``value`` before and after it (16-byte aligned, as torch's are)."""
    whole = torch.full((t.numel() + 512,), value, dtype=t.dtype, device=DEVICE)
    whole[256:-256] = t.flatten().to(DEVICE)
    return whole[256:-256].view(t.shape)


def case(bits, table, group, n, k, m, dtype):
    """x, weight and dequantized weight; whatever a kernel reads outside of its arrays is NaN or all ones."""
    gen = torch.Generator().manual_seed(n * k + m)
    q = quantize(torch.randn(n, k, generator=gen), bits, table, group)
    w = GpuWeight.from_quant_tensor(q)
    w = GpuWeight(surrounded(w.codes, -1), surrounded(w.scales, torch.nan), w.table.to(DEVICE), w.shape, bits, w.group)
    x = torch.full((m, k + 24), torch.nan, dtype=dtype, device=DEVICE)[:, :k]  # rows further apart than K
    x.copy_(torch.randn(m, k, generator=gen))
    return x, w, q.dequantize().double()


def check(y, x, w, dense, bias=None):
    """Against fp64. Levels, activations and their products (11 + 8 significant bits) are exact in fp32.

    What rounds, relative to S = sum |x w| + |bias|: at most K additions, one per folded group and per split (at most
    64), the scale and the bias: each 2^-24 when rounded to nearest, 2^-23 when truncated as tensor cores do. In a
    single row's grouped sums scale * level is exact and its product with x rounds once. Then one rounding to y's
    dtype, half a unit of its 11 or 8 significant bits; the interpreter truncates to bf16, a whole unit.
    """
    truncated = 2.0**-7 if DEVICE == "cpu" else 2.0**-8
    unit = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: truncated}[y.dtype]
    x, y = x.double().cpu(), y.double().cpu()
    bias = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double().cpu()
    size = x.abs() @ dense.T.abs() + bias.abs()
    wanted = x @ dense.T + bias
    roundings = w.shape[1] + w.scales.shape[0] + 64 + 4
    tolerance = roundings * 2.0**-23 * size + unit * wanted.abs() + (2.0**-24 if unit else 0)
    off = (y - wanted).abs()
    assert y.shape == wanted.shape and bool((off <= tolerance).all()), f"off by {float(off.max()):g}"


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("bits", "table"), TABLES, ids=str)
def test_against_fp64(bits, table, group, guarded):
    """All tables and groups, every count of rows; shapes, dtypes and biases take turns."""
    start = TABLES.index((bits, table)) + (group is not None)
    for i, m in enumerate(ROWS):
        n, k = SHAPES[(start + i) % len(SHAPES)]
        dtype = torch.bfloat16 if (start + i) % 3 == 0 else torch.float16
        x, w, dense = case(bits, table, group, n, k, m, dtype)
        bias = surrounded(torch.randn(n), torch.nan) if (start + i) % 2 else None
        check(linear(x, w, bias, out_dtype=torch.float32), x, w, dense, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_result_has_the_dtype_of_x(m, dtype, guarded):
    x, w, dense = case(4, None, None, 40, 100, m, dtype)
    y = linear(x, w)
    assert y.dtype == dtype
    check(y, x, w, dense)


@pytest.mark.parametrize(("bits", "group"), [(1, 64), (2, None), (4, 192), (8, 128)])
@pytest.mark.parametrize("block_m", [1, 16])
def test_splitting_k(bits, group, block_m, guarded):
    """One to many parts, uneven ones too (K = 420 is 7 chunks); more than there are iterations are cut down."""
    bias = torch.randn(21).half().to(DEVICE)
    for parts in (1, 5, 64):
        x, w, dense = case(bits, None, group, 21, 420, 1 if block_m == 1 else 5, torch.float16)
        config = KernelConfig(block_m, 64, 128 if group else 64, 4, 2, split_k=parts)
        check(linear(x, w, bias, config=config), x, w, dense, bias)


def test_large_tiles_and_many_bands(guarded):
    """More than 8 row tiles, so that a second, lower band of programs follows the first."""
    x, w, dense = case(2, "ternary", None, 50, 70, 270, torch.float16)
    check(linear(x, w, config=KernelConfig(32, 32, 64, 4, 2)), x, w, dense)
    x, w, dense = case(4, None, 128, 130, 256, 40, torch.float16)
    check(linear(x, w, config=KernelConfig(128, 128, 128, 8, 2)), x, w, dense)


class Watched:
    """The interpreter's backend; every address that is loaded or stored must lie in one of ``arrays``."""

    def __init__(self, backend, arrays: list[torch.Tensor]):
        self.backend, self.arrays = backend, arrays

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def check(self, pointers, mask, size: int) -> None:
        first = torch.from_numpy(pointers[mask].astype("int64"))
        inside = torch.zeros(first.shape, dtype=torch.bool)
        for t in self.arrays:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            inside |= (first >= t.data_ptr()) & (first + size <= t.data_ptr() + extent * t.element_size())
        assert bool(inside.all()), "access out of bounds"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, other.itemsize)
        return self.backend.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.check(pointers, mask, value.itemsize)
        return self.backend.store(pointers, value, mask)


@pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter; on a GPU compute-sanitizer does")
@pytest.mark.parametrize(("bits", "table", "group"), [(1, None, None), (2, None, 64), (4, "pow2", None), (8, None, 64)])
def test_no_access_out_of_bounds(bits, table, group, guarded, monkeypatch):
    """Reads too: a masked result hides them from the comparison with the oracle."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    watched = Watched(interpreter._interpreter, guarded)
    monkeypatch.setattr(interpreter, "_interpreter", watched)
    config = KernelConfig(1, 64, 128, 4, 2, split_k=2)
    for m in (1, 3, 17):
        x, w, dense = case(bits, table, group, 37, 300, m, torch.float16)  # 5 chunks, in iterations of 2
        bias = torch.randn(37)
        guarded[:] = [x, w.codes, w.scales, w.table, bias]
        check(linear(x, w, bias, config=config if m == 1 else None), x, w, dense, bias)
    guarded[:] = [x]
    with pytest.raises(Exception, match="access out of bounds"):  # Triton wraps what a kernel raises
        linear(x, w)


def test_shapes_of_x(guarded):
    _, w, dense = case(4, None, None, 10, 64, 1, torch.float16)
    flat = torch.randn(12, 64).half().to(DEVICE)
    wanted = linear(flat, w)
    check(wanted, flat, w, dense)
    assert torch.equal(linear(flat.view(3, 4, 64), w), wanted.view(3, 4, 10))
    assert torch.equal(linear(flat[0], w), linear(flat[:1], w)[0])
    transposed = flat.t().contiguous().t()  # inputs not adjacent: copied
    assert torch.equal(linear(transposed, w), wanted)
    assert linear(flat[:0], w).shape == (0, 10) and linear(flat.view(3, 4, 64)[:, :0], w).shape == (3, 0, 10)


def test_infinite_activations_stay_in_their_row(guarded):
    x, w, _ = case(2, None, None, 20, 100, 4, torch.float16)
    clean = linear(x, w)
    x[2, 50] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter
        y = linear(x, w)
    keep = [0, 1, 3]
    assert torch.equal(y[keep], clean[keep]) and not bool(torch.isfinite(y[2]).any())


def test_bad_arguments_are_named():
    x, w, _ = case(4, None, None, 10, 64, 3, torch.float16)
    with pytest.raises(LowbitError, match=r"float16 or bfloat16 tensor, not \[3, 64\] torch.float32"):
        linear(x.float(), w)
    with pytest.raises(LowbitError, match=r"x \[3, 63\] does not end in K = 64 of the weight \[10, 64\]"):
        linear(x[:, :-1], w)
    with pytest.raises(LowbitError, match=r"bias must be a float tensor \[10\]"):
        linear(x, w, torch.zeros(9))
    with pytest.raises(LowbitError, match="out_dtype must be"):
        linear(x, w, out_dtype=torch.int8)
    with pytest.raises(LowbitError, match="weight must be a GpuWeight"):
        linear(x, x)
    with pytest.raises(LowbitError, match=r"the weight is on .*, x on meta"):
        linear(x.to("meta"), w)
    with pytest.raises(LowbitError, match="block_m = 1 does not serve 3 rows"):
        linear(x, w, config=KernelConfig(1, 32, 64, 4, 2))


def test_no_triton_and_no_gpu_are_errors():
    """In a fresh process without the interpreter: Triton blocked first, then there but without CUDA tensors."""
    code = """if True:
        import sys, torch
        from lowbit import LowbitError, quantize
        from lowbit.kernels import GpuWeight, linear

        w = GpuWeight.from_quant_tensor(quantize(torch.randn(4, 64), 4))
        sys.modules["triton"] = None
        for _ in range(2):
            try:
                print("no error:", linear(torch.zeros(1, 64).half(), w))
            except LowbitError as error:
                print(error)
            sys.modules.pop("triton")
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    no_triton, no_gpu = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).splitlines()
    assert "need Triton, which cannot be imported" in no_triton and "pip install 'lowbit[gpu]'" in no_triton
    assert "need CUDA tensors, these are on the CPU: use lowbit.linear there" in no_gpu
