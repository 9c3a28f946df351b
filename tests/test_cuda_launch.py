"""The host side of the CUDA kernels (lowbit.kernels.cuda, linear()) with the emulator in the extension's place."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cuda_host import Emulated, emulate
from test_cuda_host import DTYPES, FORMATS, check, weight

from lowbit.errors import LowbitError
from lowbit.kernels import config, cuda, launch, linear
from lowbit.kernels.config import NATIVE_TILES, native_splits


@pytest.fixture
def emulated(monkeypatch) -> Emulated:
    return emulate(monkeypatch)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_linear(bits, table, group, emulated):
    """Ragged K, rows that have to be copied, leading dimensions, biases of 16 bits, splits as the table has them."""
    w, dense = weight(bits, table, 70, 380, group)
    for m, dtype in zip((1, 3, 16, 20), DTYPES * 2):
        x = torch.randn(m, 380).to(dtype)
        bias = torch.randn(70).half()
        check(linear(x, w, bias, torch.float32), x, dense, bias)
        check(linear(x, w), x, dense)
    assert {call["tile_m"] for call in emulated.calls} == {16, 32}
    assert any(call["splits"] > 1 for call in emulated.calls)


def test_outputs_of_another_16_bit_type(emulated):
    """Kernels write the type of x or fp32; everything else is converted, not reinterpreted."""
    w, dense = weight(4, None, 40, 128)
    for dtype, wanted in zip(DTYPES, reversed(DTYPES)):
        x = torch.randn(2, 128).to(dtype)
        residual = torch.randn(2, 40).to(wanted)
        y = linear(x, w, out_dtype=wanted, residual=residual)
        assert y.dtype == wanted
        check(y, x, dense, residual=residual)


def test_a_residual_that_is_a_view(emulated):
    """Its rows lie further apart than those of the result."""
    w, dense = weight(2, None, 40, 128)
    x, wide = torch.randn(3, 128).half(), torch.randn(3, 100)
    check(linear(x, w, None, torch.float32, residual=wide[:, 10:50]), x, dense, residual=wide[:, 10:50])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_panels(dtype, emulated, monkeypatch):
    monkeypatch.setattr(cuda, "_PANEL_BYTES", 2 * 384 * 64)  # 64 rows at a time
    w, dense = weight(4, None, 150, 380)
    x, bias = torch.randn(5, 380).to(dtype), torch.randn(150)
    y = linear(x, w, bias, route="dense").double()
    rounded = dense.to(dtype).double()
    size = x.double().abs() @ rounded.abs().T + bias.abs()
    # Two roundings to 16 bits, of the product and after the bias, and the library's fp32 sums.
    unit = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert bool(((y - x.double() @ rounded.T - bias.double()).abs() <= (unit + 380 * 2.0**-23) * size).all())


def test_warp_group_products(emulated):
    w, dense = weight(2, None, 70, 380)
    for m in (1, 129):
        x, residual = torch.randn(m, 380).half(), torch.randn(m, 70)
        check(linear(x, w, None, torch.float32, residual=residual, route="wgmma"), x, dense, residual=residual)
        assert emulated.calls[-1]["packed_x"] and emulated.calls[-1]["tile_m"] == 128


def test_where_there_are_no_warp_group_products(emulated, monkeypatch):
    """The table's choice gives way, a caller's is an error."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "has_wgmma", lambda device: False)
    monkeypatch.setattr(launch.tuned, "apply_once", lambda device: None)
    monkeypatch.setitem(config.ROUTES, (2, 3), "wgmma")
    assert launch.serves(2, 100, device) == "cuda"
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "module", lambda: emulated)
    monkeypatch.setattr(cuda, "has_wgmma", lambda device: False)
    with pytest.raises(LowbitError, match="the route wgmma needs an H100 or H200"):
        launch._route("wgmma", None, None, 1, device)


def test_rows(emulated):
    w, dense = weight(2, "ternary", 70, 200, 64)
    ids = torch.tensor([69, 0, 5])
    assert torch.equal(cuda.rows(w, ids).double(), dense[ids]) and cuda.rows(w, ids[:0]).shape == (0, 200)


def test_counters_belong_to_a_stream_or_to_a_recording(emulated, monkeypatch):
    """A graph is replayed on any stream: it must not share counters, nor rely on what was cleared outside of it."""
    w, _ = weight(4, None, 64, 512)
    y, x = torch.empty(1, 64), torch.randn(1, 512).half()

    def address(graph: int, stream: int = 5) -> int:
        emulated.graph = graph
        monkeypatch.setattr(cuda, "_queue", lambda device: (0, stream))
        cuda.linear(x, w, None, y, splits=2)
        return emulated.calls[-1]["arrived"]

    eager, held = address(0), list(cuda._counters.values())
    assert address(0) == eager != address(0, stream=6)
    first, held = address(7), [*held, *cuda._counters.values()]
    assert first == address(7) and first not in (eager, address(7, stream=6))
    held += cuda._counters.values()
    assert address(8) not in (eager, first) and address(0) == eager
    assert held  # kept, so that no address was given out twice


def test_many_tiles_are_not_split(emulated, monkeypatch):
    """More tiles than counters: the table's choice gives way, a caller's is an error."""
    w, dense = weight(4, None, 192, 4096)
    x, y = torch.randn(1, 4096).half(), torch.empty(1, 192)
    assert native_splits(4, 16, 1, 192, 4096, 4) > 1
    monkeypatch.setattr(cuda, "_COUNTERS", 2)
    cuda.linear(x, w, None, y)
    assert emulated.calls[-1]["splits"] == 1
    check(y, x, dense)
    with pytest.raises(LowbitError, match="3 tiles cannot be split along K"):
        cuda.linear(x, w, None, y, splits=2)


def test_tiles_by_rows(emulated):
    w, _ = weight(2, None, 64, 64)
    for m in (1, 16, 17, 32, 33, 64, 65, 129):
        cuda.linear(torch.zeros(m, 64).half(), w, None, torch.empty(m, 64))
        assert emulated.calls[-1]["tile_m"] == next((t for t in NATIVE_TILES if m <= t), 128)


def test_a_residual_elsewhere_is_named(emulated):
    w, _ = weight(2, None, 64, 64)
    with pytest.raises(LowbitError, match="residual is on meta, x on cpu"):
        linear(torch.zeros(1, 64).half(), w, residual=torch.zeros(1, 64, device="meta").half())


def test_an_extension_that_does_not_load_is_an_error(monkeypatch):
    """One that was built, for instance for another Python, must not give way to Triton in silence."""
    cuda.module.cache_clear()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, "lowbit._CUDA", None)
    monkeypatch.delattr("lowbit._CUDA", raising=False)
    with pytest.raises(LowbitError, match="the CUDA extension cannot be loaded"):
        cuda.module()
    monkeypatch.undo()
    cuda.module.cache_clear()
