"""`lowbit tune`: measure which GPU kernel and which tiles serve each bit width and number of rows; keep the result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import locked
from lowbit.tools import cli

_SIZE = (4096, 4096)  # outputs, inputs
_LARGE = 4096  # rows that stand for "any number"
_COLD_BYTES = 256 * 2**20
_TOLERANCE = 2e-3  # of fp16 results, relative


def parser() -> argparse.ArgumentParser:
    p = cli.parser("tune", "lowbit tune --bits 2 4", "For the CPU's kernels: lowbit tune-cpu.")
    p.add_argument("--bits", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4, 8], help="widths to measure")
    p.add_argument("--out", metavar="FILE", help="default: the user's cache folder, or LOWBIT_GPU_TUNING")
    p.add_argument("--force", action="store_true", help="measure again what the file holds already")
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lowbit import tuning
    from lowbit.kernels import tuned
    from lowbit.kernels.config import BUCKETS

    if not torch.cuda.is_available():
        raise LowbitError(
            "lowbit tune measures on a CUDA GPU, and PyTorch finds none here; for the CPU: lowbit tune-cpu"
        )
    gpu = torch.cuda.get_device_name()
    say = cli.console(args).print
    path = Path(args.out) if args.out else tuning.chosen_path(tuned.VARIABLE) or tuned.default_path(gpu)
    with locked(path):
        choices = tuned.read(path, gpu) if path.exists() and not args.force else {}
        times: list[dict[str, Any]] = []
        for bits in cli.track([b for b in args.bits if (b, 0) not in choices], "bit widths"):
            for bucket, most in enumerate(BUCKETS):
                rows = most or _LARGE
                found = sorted(measure(bits, bucket, rows, say), key=lambda f: f[0])
                if not found:
                    raise LowbitError(f"no kernel of {bits} bits runs here with {rows} rows")
                choices[bits, bucket] = best(found)
                times.append({"bits": bits, "rows": rows, "us": {f"{r} {c}": s * 1e6 for s, r, c in found}})
                named = f"up to {most} rows" if most else "more rows"
                say(f"{bits} bits, {named}: {found[0][1]}, {found[0][0] * 1e6:.1f} us")
            tuned.write(path, gpu, choices, times)  # after each width: what is measured is kept
    say(f"kept in {path}", soft_wrap=True)
    return {"path": str(path), "gpu": gpu, "shape": list(_SIZE), "measured": times}


def best(found: Sequence[tuple[float, str, Any]]) -> tuple[str, Any]:
    """The fastest route and the tiles of the fastest Triton kernel, of (seconds, route, tiles) by rising seconds."""
    return found[0][1], next((tiles for _, route, tiles in found if route == "triton"), found[0][2])


def candidates(bits: int, bucket: int, rows: int) -> Iterator[tuple[str, Any]]:
    """(route, tiles) worth a measurement: a bounded list."""
    import torch

    from lowbit.kernels import cuda
    from lowbit.kernels.config import CONFIGS, GEMV_MAX_ROWS

    base = CONFIGS[bits, bucket]
    if cuda.module() is not None:
        yield "cuda", base
        if rows > GEMV_MAX_ROWS and cuda.has_wgmma(torch.device("cuda")):
            yield "wgmma", base
        if rows >= 256:
            yield "dense", base
    seen = []
    for change in ({}, {"block_n": 128}, {"block_k": 128}, {"stages": 3}, {"warps": 4}, {"warps": 8}, {"block_n": 64}):
        if rows <= GEMV_MAX_ROWS and change.get("warps") == 8:
            continue
        try:
            config = replace(base, **change)
        except LowbitError:  # tiles that do not fit
            continue
        if config not in seen:
            seen.append(config)
            yield "triton", config


def measure(bits: int, bucket: int, rows: int, say: Callable[[str], None]) -> Iterator[tuple[float, str, Any]]:
    """(seconds, route, tiles) of every candidate that this GPU can run; ``say`` is told of the others."""
    import torch

    from lowbit.kernels import linear
    from lowbit.kernels.tuned import random_weight, seconds_a_call, worst_error

    copies = max(1, _COLD_BYTES * 8 // (_SIZE[0] * _SIZE[1] * bits)) if rows <= 64 else 1
    weights = [random_weight(*_SIZE, bits, None, "cuda", seed) for seed in range(copies)]
    x = torch.randn(rows, _SIZE[1], device="cuda").half()
    for route, config in candidates(bits, bucket, rows):
        tiles = config if route == "triton" else None
        try:
            error = worst_error(linear(x, weights[0], config=tiles, route=route), x, weights[0])
            if not error < _TOLERANCE:
                raise LowbitError(f"wrong result, relative error {error:g}: {bits} bits, {rows} rows, {route} {config}")
            seconds = seconds_a_call([lambda w=w, r=route, t=tiles: linear(x, w, config=t, route=r) for w in weights])
        except RuntimeError as error:  # a tile that this GPU has no room for: Triton's OutOfResources is one
            say(f"{route} {config}: {str(error).splitlines()[0][:100]}")
            continue
        yield seconds, route, config


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    raise SystemExit(main())
