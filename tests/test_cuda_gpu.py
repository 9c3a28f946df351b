"""The kernels on a GPU, against the fp64 oracle, with poisoned outputs; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from test_cuda_host import DTYPES, FORMATS, activations, check, weight

from lowbit.errors import LowbitError
from lowbit.kernels import cuda, linear
from lowbit.kernels.config import BUCKETS, NATIVE_TILES
from lowbit.kernels.tuned import random_weight

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.module() is None, reason="needs a CUDA GPU and lowbit._CUDA"
)


def run(w, x, *, tile_m, splits, bias=None, residual=None, y_dtype=torch.float32, activation=None, wgmma=False):
    """One launch of a CUDA kernel into NaN between guards."""
    m, n = x.shape[0], w.shape[0]
    whole = torch.full((m + 2, n), 777.0, dtype=y_dtype, device="cuda")
    y = whole[1:-1]
    y.fill_(torch.nan)
    if residual is not None:
        y.copy_(residual)
    bias = None if bias is None else bias.cuda()
    cuda.linear(x.cuda(), w, bias, y, None if residual is None else y, activation, splits, tile_m, wgmma=wgmma)
    torch.cuda.synchronize()
    assert bool((whole[0] == 777).all() and (whole[-1] == 777).all()), "write out of bounds"
    return y.cpu()


@pytest.mark.parametrize("tile_m", NATIVE_TILES)
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_cuda_kernels(bits, table, group, tile_m):
    turn = FORMATS.index((bits, table)) + tile_m // 16
    sizes = [1, 8, 9, 16] if tile_m == 16 else [tile_m // 2 + 3, tile_m + 5]
    for i, m in enumerate(sizes):
        n, k = [(70, 380), (1000, 1160), (4096, 4096), (33, 64)][(turn + i) % 4]
        if n == 4096:  # quantizing would take long
            w = random_weight(n, k, bits, group, "cuda", i)
            dense = w.dequantize().double().cpu()
        else:
            w, dense = weight(bits, table, n, k, group if k > 64 else None)
            w = w.to("cuda")
        for dtype in DTYPES:
            x = activations(m, k, dtype)
            bias = torch.randn(n) if i % 2 else None
            for splits in (1, 3):
                y = run(w, x, tile_m=tile_m, splits=splits, bias=bias)
                check(y, x, dense, bias)


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_warp_group_products(bits, table, group):
    if not cuda.has_wgmma(torch.device("cuda", 0)):
        pytest.skip("needs an H100 or H200, and an extension compiled for 90a")
    for i, (m, n, k) in enumerate([(130, 70, 380), (7, 33, 64), (300, 1000, 1160)]):
        w, dense = weight(bits, table, n, k, group if k > 128 else None)
        w = w.to("cuda")
        for dtype in DTYPES:
            x = activations(m, k, dtype)
            bias = torch.randn(n) if i % 2 else None
            for splits in (1, 3):
                check(run(w, x, tile_m=128, splits=splits, bias=bias, wgmma=True), x, dense, bias)


def test_residual_and_activation():
    w, dense = weight(2, None, 200, 256)
    w = w.to("cuda")
    for m, tile_m in ((3, 16), (40, 64)):
        x, residual, bias = activations(m, 256, torch.float16) * 0.05, torch.randn(m, 200), torch.randn(200)
        for activation, function in ((None, lambda v: v), ("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
            y = run(w, x, tile_m=tile_m, splits=2, bias=bias, residual=residual, activation=activation)
            wanted = residual.double() + function(x[:, :256].double() @ dense.T + bias.double())
            size = x[:, :256].double().abs() @ dense.abs().T + bias.abs() + residual.abs()
            assert bool(((y.double() - wanted).abs() <= 300 * 2.0**-23 * size + 2.0**-20 * size).all())


@pytest.mark.parametrize(("bits", "table"), FORMATS, ids=str)
def test_rows_and_dense(bits, table):
    w, dense = weight(bits, table, 1000, 328, 64)
    w = w.to("cuda")
    ids = torch.tensor([999, 0, 63, 64, 0], device="cuda")
    assert torch.equal(cuda.rows(w, ids).double().cpu(), dense[ids.cpu()])
    for dtype in DTYPES:
        x = torch.randn(33, 328).to(dtype)
        y = linear(x.cuda(), w, route="dense").cpu().double()
        rounded = dense.to(dtype).double()  # this route rounds weights, as a 16-bit model does
        size = x.double().abs() @ rounded.abs().T
        unit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
        assert bool(((y - x.double() @ rounded.T).abs() <= (unit + 328 * 2.0**-23) * size + 2.0**-20).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_row_count_of_the_table(bits):
    """linear() by the routing table, at the edges of its buckets, twice: bit for bit the same."""
    w, dense = weight(bits, None, 512, 512)
    w = w.to("cuda")
    for m in sorted({1, 2, 2000, *(b + d for b in BUCKETS if b for d in (0, 1))}):
        x = activations(m, 512, torch.float16).cuda()
        y = linear(x, w, out_dtype=torch.float32)
        assert torch.equal(y, linear(x, w, out_dtype=torch.float32))
        wanted = x.double() @ dense.cuda().T
        off = (y.double() - wanted).norm() / wanted.norm()
        assert off < (2.0**-10 if m > BUCKETS[-2] else 2.0**-18), (m, float(off))


def test_two_streams_do_not_share_counters():
    w, dense = weight(4, None, 4096, 1024)
    w = w.to("cuda")
    x = activations(1, 1024, torch.float16)
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            y = torch.full((1, 4096), torch.nan, device="cuda")
            cuda.linear(x.cuda(), w, None, y, splits=4)
            results.append(y)
    torch.cuda.synchronize()
    check(results[0].cpu(), x, dense)
    assert all(torch.equal(y, results[0]) for y in results)


def test_replayed_in_a_graph():
    w, dense = weight(2, None, 512, 1024)
    w = w.to("cuda")
    x = activations(1, 1024, torch.float16).cuda()
    y = torch.zeros(1, 512, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cuda.linear(x, w, None, y, splits=2)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cuda.linear(x, w, None, y, splits=2)
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(y.cpu(), x.cpu(), dense)


def test_two_graphs_at_a_time():
    """Recorded on one stream that never ran anything, replayed on two: neither shares counters with the other."""
    w, dense = weight(4, None, 4096, 1024)
    w = w.to("cuda")
    x = activations(1, 1024, torch.float16).cuda()
    run(w, x, tile_m=16, splits=4)  # kernels are loaded outside of the recording
    recorder, graphs, results = torch.cuda.Stream(), [], []
    for _ in range(2):
        y, graph = torch.zeros(1, 4096, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=recorder):
            for _ in range(8):
                cuda.linear(x, w, None, y, splits=4)
        graphs.append(graph)
        results.append(y)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for y, stream, graph in zip(results, streams, graphs):
            with torch.cuda.stream(stream):
                y.fill_(torch.nan)
                graph.replay()
    torch.cuda.synchronize()
    for y in results:
        check(y.cpu(), x.cpu(), dense)


def test_products_in_a_row_wait_for_each_other():
    """Each reads what the one before wrote, which starts before that one's end (programmatic dependent launch)."""
    w, dense = weight(4, None, 1024, 1024)
    w = w.to("cuda")
    start = activations(1, 1024, torch.float16).cuda() * 0.05
    for early in (True, False):
        x = start
        for _ in range(12):
            y = torch.full((1, 1024), torch.nan, dtype=torch.float16, device="cuda")
            cuda.linear(x, w, None, y, splits=2, early=early)
            check(y.cpu(), x.cpu(), dense)
            x = y / y.float().norm().half()
    outs = [torch.full((1, 1024), torch.nan, dtype=torch.float16, device="cuda") for _ in range(12)]
    small = random_weight(1024, 1024, 8, None, "cuda", 0)
    small.scales.fill_(2.0**-12)
    dense = small.dequantize().double().cpu()
    for _ in range(10):
        for before, y in zip([start, *outs], outs):
            cuda.linear(before, small, None, y, splits=2)
        torch.cuda.synchronize()
        for before, y in zip([start, *outs], outs):
            check(y.cpu(), before.cpu(), dense)


def test_another_current_device_does_not_matter():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    w, dense = weight(2, None, 64, 256)
    x, w = activations(1, 256, torch.float16), w.to("cuda:1")
    y = torch.full((1, 64), torch.nan, device="cuda:1")
    with torch.cuda.device(0):
        cuda.linear(x.to("cuda:1"), w, None, y)
    check(y.cpu(), x, dense)


def test_what_cannot_run_is_named():
    w, _ = weight(4, None, 64, 64)
    with pytest.raises(LowbitError, match="the weight is on cpu"):
        linear(torch.zeros(1, 64, dtype=torch.float16, device="cuda"), w)
    with pytest.raises(LowbitError, match="run on CUDA tensors"):
        linear(torch.zeros(1, 64, dtype=torch.float16), w, route="cuda")
