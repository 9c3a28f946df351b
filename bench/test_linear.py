"""`lowbit.linear` beside torch and ONNX Runtime: pytest bench --benchmark-enable [--quick]; `make bench` runs it.

Every result, ours and theirs, is checked against fp64 before it is timed. Timings are paired (timing.py); what
pytest-benchmark measures of a cell is our time alone, for its own table and comparisons.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from cases import COLD_BYTES, Cell, activations, check, copies, grid, matrix, variants
from ceilings import Reader
from peers import CHEAP_PEERS, PEERS, Absent

from lowbit import linear
from lowbit.ops import available_isas, set_isa
from lowbit.tools.timing import FULL, QUICK, compare, quartiles, ratios, repeats, rotate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        cells = grid(quick) + variants(quick, available_isas())
        metafunc.parametrize("cell", cells, ids=lambda c: c.id)


def peers_of(cell: Cell, w: torch.Tensor) -> tuple[dict[str, list], dict[str, str]]:
    """Copies of every peer that can do the cell, checked; and why the others cannot."""
    taking_part, absent = {}, {}
    for name, kind in PEERS.items():
        if name not in CHEAP_PEERS and (cell.cold or not cell.plain):
            absent[name] = "measured hot only" if cell.cold else "measured beside the plain kernels only"
            continue
        try:
            peer = peer_for(name, w, cell.bits)
        except Absent as reason:
            absent[name] = str(reason)
            continue
        error = peer.error(activations(cell))
        assert error < kind.tolerance, f"{name}: wrong on {cell.id}: error {error:.3g}"
        taking_part[name] = peer.copies(-(-COLD_BYTES // peer.nbytes)) if cell.cold else [peer]
    return taking_part, absent


_peers: dict = {}


def peer_for(name: str, w: torch.Tensor, bits: int):
    """A peer is kept as long as the matrix is the same."""
    if _peers.get("of") is not w:
        _peers.clear()
        _peers["of"] = w
    if name not in _peers:
        _peers[name] = PEERS[name](w, bits)
    return _peers[name]


def measure(cell: Cell, quick: bool, benchmark, reader: Reader) -> dict[str, Any]:
    """What the record says of a cell; times in microseconds, ratios of theirs to ours as quartiles.

    "reads": the time to read `reader.NBYTES` over ours, for every way to read, where a product is as long as its reads.
    """
    weight, w = matrix(cell.n, cell.k, cell.bits, cell.group, cell.table)
    x = activations(cell)
    check(cell, weight, x, w)
    weights = copies(weight) if cell.cold else [weight]
    theirs, absent = peers_of(cell, w)
    calls = {"lowbit": rotate([lambda w=w: linear(x, w, compute=cell.compute) for w in weights])}
    calls |= {name: rotate([p.call(x) for p in those]) for name, those in theirs.items()}
    if cell.group or cell.table:
        plain, _ = matrix(cell.n, cell.k, cell.bits, None, None)
        theirs["lowbit plain"] = [plain]
        calls["lowbit plain"] = lambda: linear(x, plain)
    reads = reader.calls() if cell.cold and cell.m == 1 else {}
    times = compare(calls | reads, QUICK if quick else FULL)
    benchmark.pedantic(calls["lowbit"], rounds=3, iterations=repeats(calls["lowbit"], 0.001))
    low, middle, high = (1e6 * t for t in quartiles(times["lowbit"]))
    return {
        "kernel": weight.kernel_name(cell.m, cell.compute), "nbytes": weight.nbytes, "copies": len(weights),
        "us": middle, "us_low": low, "us_high": high, "rounds": len(times["lowbit"]), "absent": absent,
        "peers": {
            name: {"us": 1e6 * quartiles(times[name])[1], "ratio": ratios(times[name], times["lowbit"])}
            for name in theirs
        },
        "reads": {name: ratios(times[name], times["lowbit"]) for name in reads}, "read_nbytes": reader.NBYTES,
    }  # fmt: skip


def test_linear(benchmark, record, reader, quick, cell):
    if cell.id in record.done:
        pytest.skip("measured before; delete the record to measure again")
    set_isa(cell.isa)
    try:
        result = measure(cell, quick, benchmark, reader)
    finally:
        set_isa(None)
    what = asdict(cell) | {"isa": cell.isa or record.header["isa"]}
    record.add(kind="cell", id=cell.id, operations=cell.operations, **what, **result)
    benchmark.extra_info.update(us=result["us"], kernel=result["kernel"])
