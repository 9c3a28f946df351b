"""The GPU kernels beside cuBLAS fp16 and fp32, torch's int4 (tinygemm), and GemLite and bitsandbytes where installed.

    python bench/gpu_kernels.py --out runs/gpu/kernels.json --seconds 240
    python bench/gpu_kernels.py --dry-run        no GPU: the cases, their bytes and the time a copy of them takes

Each result is checked against fp64 before it is timed. Cold: calls rotate among copies of the weight that together are
ten times the L2 cache. Shares are of the bandwidth of a large copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gpu_common import COLD_BYTES, Deadline, ceilings

from lowbit.kernels import cuda, linear
from lowbit.kernels.launch import serves
from lowbit.kernels.tuned import random_weight, seconds_a_call, worst_error
from lowbit.tables import BITS

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
ROWS = [1, 4, 16, 64, 512, 4096]
GROUPED = [(4, 128, 1), (4, 128, 16), (4, 128, 512), (2, 64, 1)]  # bits, group, rows, on the second shape
H100_BYTES = 3.0e12  # bytes/s for the dry run's estimate only
TOLERANCE = 2e-3  # fp16 result; the "dense" route also rounds the weights


@dataclass(frozen=True)
class Case:
    """One product: W [n, k], ``rows`` rows of x."""

    n: int
    k: int
    bits: int
    group: int | None
    rows: int
    route: str

    @property
    def weight_bytes(self) -> int:
        groups = self.k // (self.group or self.k)
        return self.n * self.k * self.bits // 8 + 2 * self.n * groups

    @property
    def bytes(self) -> int:
        """The least that must move: weights, activations in, results out."""
        return self.weight_bytes + 2 * self.rows * (self.k + self.n)


def cases() -> Iterator[Case]:
    """The issue of most interest first: a run that ends early has them."""
    for rows in ROWS:
        for n, k in SHAPES if rows <= 64 else SHAPES[:2]:
            for bits in (8, 4, 2, 1):
                yield Case(n, k, bits, None, rows, "cuda")
    for bits, group, rows in GROUPED:
        yield Case(*SHAPES[1], bits, group, rows, "cuda")
    for route, rows in (("wgmma", (64, 512, 4096)), ("triton", (1, 16, 64, 512, 4096)), ("dense", (512, 4096))):
        for m in rows:
            for bits in (4, 2):
                yield Case(*SHAPES[1], bits, None, m, route)


def cold_copies(size: int, rows: int) -> int:
    """Weights of ``size`` bytes to rotate among, so that none is in the L2 cache when its turn comes."""
    return max(1, COLD_BYTES // size) if rows <= 64 else 1


def measure(case: Case) -> dict:
    """Time, rates and error of one of our kernels."""
    copies = cold_copies(case.weight_bytes, case.rows)
    weights = [random_weight(case.n, case.k, case.bits, case.group, "cuda", seed) for seed in range(copies)]
    x = torch.randn(case.rows, case.k, device="cuda").half()
    y = torch.full((case.rows, case.n), torch.nan, dtype=torch.float16, device="cuda")
    if case.route == "cuda":
        calls = [lambda w=w: cuda.linear(x, w, None, y) for w in weights]
        calls[0]()
        error = worst_error(y, x, weights[0])
    else:
        calls = [lambda w=w: linear(x, w, route=case.route) for w in weights]
        error = worst_error(calls[0](), x, weights[0])
    if not error < TOLERANCE:
        raise SystemExit(f"bench: wrong result, relative error {error:g}: {case}")
    seconds = seconds_a_call(calls)
    found = {"us": seconds * 1e6, "gb_per_s": case.bytes / seconds / 1e9, "error": error,
             "tflop_per_s": 2 * case.rows * case.n * case.k / seconds / 1e12}  # fmt: skip
    if case.route == "cuda" and case.rows == 1:  # what starting before the end of the kernel before saves
        found["us_one_after_the_other"] = 1e6 * seconds_a_call(
            [lambda w=w: cuda.linear(x, w, None, y, early=False) for w in weights]
        )
    return found


def baselines(n: int, k: int, rows: int) -> dict[str, float | str]:
    """Microseconds of what others offer for the same product, cold as ours."""
    copies = cold_copies(2 * n * k, rows)
    found: dict[str, float | str] = {}
    for name, make in BASELINES.items():
        try:
            calls = make(n, k, rows, copies)
        except ImportError:
            found[name] = "not installed"
            continue
        except (RuntimeError, AttributeError, TypeError) as error:
            found[name] = f"failed: {str(error).splitlines()[0][:100]}"
            continue
        found[name] = seconds_a_call(calls) * 1e6
        del calls
    return found


def _dense(dtype: torch.dtype) -> Callable:
    def make(n: int, k: int, rows: int, copies: int) -> list[Callable]:
        x = torch.randn(rows, k, dtype=dtype, device="cuda")
        ws = [torch.randn(n, k, dtype=dtype, device="cuda") for _ in range(copies)]
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in ws]

    return make


def _tinygemm(n: int, k: int, rows: int, copies: int) -> list[Callable]:
    """torch._weight_int4pack_mm: 4 bits, groups of 128, bf16."""
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    calls = []
    for _ in range(4 * copies):
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        w = torch._convert_weight_to_int4pack(raw, 8)
        scales = torch.rand(k // 128, n, 2, dtype=torch.bfloat16, device="cuda")
        calls.append(lambda w=w, s=scales: torch._weight_int4pack_mm(x, w, 128, s))
    calls[0]()
    return calls


def _gemlite(n: int, k: int, rows: int, copies: int) -> list[Callable]:
    """GemLite, 4 bits, groups of 128, fp16; its own autotuning runs first."""
    from gemlite.core import DType, GemLiteLinear

    calls = []
    x = torch.randn(rows, k, dtype=torch.float16, device="cuda")
    for _ in range(copies):
        layer = GemLiteLinear(4, group_size=128, in_features=k, out_features=n, input_dtype=DType.FP16,
                              output_dtype=DType.FP16)  # fmt: skip
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(n, k // 128, dtype=torch.float16, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        calls.append(lambda layer=layer: layer(x))
    calls[0]()
    return calls


def _bitsandbytes(n: int, k: int, rows: int, copies: int) -> list[Callable]:
    """bitsandbytes NF4, fp16."""
    import bitsandbytes as bnb

    x = torch.randn(rows, k, dtype=torch.float16, device="cuda")
    layers = []
    for _ in range(4 * copies):
        layers.append(bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float16, quant_type="nf4").cuda())
    layers[0](x)
    return [lambda layer=layer: layer(x) for layer in layers]


BASELINES = {
    "cublas_fp16": _dense(torch.float16), "cublas_fp32": _dense(torch.float32), "tinygemm_int4": _tinygemm,
    "gemlite_int4": _gemlite, "bitsandbytes_nf4": _bitsandbytes,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/kernels.json"))
    parser.add_argument("--seconds", type=float, default=240, help="start no case after this")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: list what would run")
    args = parser.parse_args(argv)
    if args.dry_run:
        return dry_run()
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline = Deadline(args.seconds)
    result: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings(),
                    "cases": [],
                    "baselines": [], "left_out": []}  # fmt: skip
    copy = result["ceilings"]["copy_bytes_per_s"]
    others: dict[tuple[int, int, int], dict] = {}
    for case in cases():
        if deadline.over():
            result["left_out"].append(asdict(case))
            continue
        key = (case.n, case.k, case.rows)
        if key not in others:
            others[key] = baselines(*key)
            result["baselines"].append({"n": case.n, "k": case.k, "rows": case.rows, "us": others[key]})
        if case.route == "wgmma" and not cuda.has_wgmma(torch.device("cuda")):
            result["left_out"].append(asdict(case))
            continue
        found = measure(case)
        fp16 = others[key]["cublas_fp16"]
        found |= {"share_of_copy": found["gb_per_s"] * 1e9 / copy, "times_fp16": fp16 / found["us"]}
        result["cases"].append(asdict(case) | found)
        print(
            f"{case.route:6} {case.bits} bits g{case.group or 'row':<4} {case.n:6}x{case.k:<5} M {case.rows:<5}"
            f"{found['us']:9.1f} us {found['gb_per_s']:7.0f} GB/s {found['share_of_copy']:5.0%} of copy "
            f"{found['tflop_per_s']:6.1f} TFLOP/s {found['times_fp16']:5.2f}x fp16",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    return 0


def dry_run() -> int:
    """All that needs no GPU: the cases, and one small weight through the host's side up to the launch."""
    for case in cases():
        served = serves(case.bits, case.rows, torch.device("cuda")) if case.route == "cuda" else case.route
        floor = max(case.bytes / H100_BYTES, 2 * case.rows * case.n * case.k / 700e12) * 1e6
        print(f"{case.route:6} {case.bits} bits g{case.group or 'row':<4} {case.n:6}x{case.k:<5} M {case.rows:<5}"
              f"{case.bytes / 1e6:8.1f} MB, at least {floor:7.1f} us; the table chooses {served}")  # fmt: skip
    for bits in BITS:
        weight = random_weight(96, 256, bits, 64, "cpu", 0)
        x = torch.randn(3, 256).half()
        assert worst_error(x.float() @ weight.dequantize().t(), x, weight) < 1e-5
        if cuda.module() is not None:
            cuda.view(weight)
    module = cuda.module()
    built = "is NOT built" if module is None else "is built"
    if module is not None:
        built += ", with" if module.built_for_wgmma else ", without"
        built += " warp-group products"
    print(f"dry run: lowbit._CUDA {built}; the next step is a launch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
