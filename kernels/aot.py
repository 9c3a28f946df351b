"""Ahead-of-time compilation of the kernels, without a GPU: registers, spills and shared memory of every variant.

    python -m lowbit.kernels.aot --arch 80 90 --variants small

prints one JSON object a line. TRITON_INTERPRET must not be set. Needs Triton with its bundled ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.kernels.config import BUCKETS, CONFIGS, GEMV_MAX_ROWS, REDUCE_BLOCK, fit_group
from lowbit.tables import BITS, DEFAULT_TABLE, TABLES

_K = 4096  # decides only whether scales are grouped


@dataclass(frozen=True)
class Variant:
    """One specialisation: the table's name fixes the bits; ``bucket`` indexes config.BUCKETS; group 0: row scales.

    ``split``: a GEMV that writes fp32 partial sums instead of y. ``ragged``: N, K and strides are no multiples of 16,
    as in a model of width 380; of others the launcher tells the compiler that they are.
    """

    table: str
    bucket: int
    group: int = 0
    dtype: str = "fp16"
    split: bool = False
    ragged: bool = False

    @property
    def bits(self) -> int:
        return TABLES[self.table].bits


# The kernels that are no matrix products, by name: log-sum-exp at 2 bits, and those of a decoding step.
OTHERS = ("reduce", "logsumexp", "norm", "attention")
# One of everything that changes the code (widths, look-up, groups, dtypes, kernels).
SMALL = (
    Variant("midrise4", 0),
    Variant("binary", 0, 64),
    Variant("midrise2", 1, split=True),
    Variant("int8", 2, 0, "bf16"),
    Variant("binary", 3, 64),
    Variant("pow2_4", 4, 64),
    Variant("midrise2", 0, ragged=True),
    Variant("midrise4", 3, 64, "bf16", ragged=True),
    *OTHERS,
)
ALL = (
    tuple(
        Variant(table, bucket, group, dtype, ragged=ragged)
        for table in (*(DEFAULT_TABLE[bits] for bits in BITS), "pow2_2", "pow2_4")
        for bucket in range(len(BUCKETS))
        for group in (0, 64)
        for dtype in ("fp16", "bf16")
        for ragged in (False, True)
    )
    + OTHERS
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers: a thread; spilled: bytes of stack a thread (0: nothing spilled); shared: bytes a program.
        wgmma, mma: tensor-core instructions in the PTX (sm_90 warp-group, and warp-level ones).
    """

    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int


def compile_variant(variant: Variant | str, arch: int) -> Usage:
    """Compile for ``sm_<arch>`` as the launcher would; a string is one of OTHERS.

    Raises:
        LowbitError: Triton or its CUDA tools are missing, or Triton runs as an interpreter.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise LowbitError(f"compiling kernels needs Triton, which cannot be imported ({error})") from None
    kernel, constants, kinds, options = _linear(variant) if isinstance(variant, Variant) else _other(variant)
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    if not isinstance(kernel, triton.JITFunction):
        raise LowbitError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    # What the launcher tells of its arguments: 16-byte aligned pointers, and whether sizes and strides are divisible by
    # 16. M is not; an M of 1 is a constant (_linear).
    ragged = ("m", "splits", "d", "head_dim", "heads")
    if isinstance(variant, Variant) and variant.ragged:
        ragged += ("n", "k", "x_stride", "y_stride")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32") and name not in ragged
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("mma.sync"))


def _other(name: str) -> tuple:
    """As :func:`_linear`."""
    from lowbit.kernels.decode import attention_kernel, norm_kernel
    from lowbit.kernels.gemv import reduce_kernel
    from lowbit.kernels.logsumexp import logsumexp_kernel

    options = {"num_warps": 4, "enable_fp_fusion": True}
    if name == "reduce":
        kinds = {"partial": "*fp32", "bias": "*fp32", "y": "*fp16"}
        return reduce_kernel, {"HAS_BIAS": True, "BLOCK_N": REDUCE_BLOCK}, kinds, options
    if name == "norm":
        kinds = {"x": "*fp32", "weight": "*fp32", "bias": "*fp32", "y": "*fp16", "eps": "fp32"}
        return norm_kernel, {"WRITE_BACK": False, "BLOCK": 512}, kinds, options
    if name == "attention":
        kinds = dict.fromkeys(("q", "k", "v", "cache", "y"), "*fp16")
        kinds |= {"angles": "*fp32", "position": "*i64", "scale": "fp32"}
        return attention_kernel, {"ROTARY": True, "BLOCK_D": 64, "BLOCK_S": 64}, kinds, options
    _, constants, kinds, options = _linear(Variant("midrise2", 2))
    kinds = {k: v for k, v in kinds.items() if k not in ("y", "out", "bias")} | dict.fromkeys(
        ("largest", "sums"), "*fp32"
    )
    return logsumexp_kernel, constants | {"HAS_BIAS": False}, kinds, options


def _linear(variant: Variant) -> tuple:
    """Kernel, compile-time arguments, types of the others (int32 where not named) and options of a variant."""
    import triton.language as tl

    from lowbit.kernels.gemm import gemm_kernel
    from lowbit.kernels.gemv import gemv_kernel

    rows = BUCKETS[variant.bucket]
    config = fit_group(CONFIGS[variant.bits, variant.bucket], variant.group or _K, _K)
    gemv = rows is not None and rows <= GEMV_MAX_ROWS
    kernel = gemv_kernel if gemv else gemm_kernel
    a, b = TABLES[variant.table].affine or (0, 0)
    constants = {
        "BITS": variant.bits, "A": a, "B": b, "GROUP": variant.group, "HAS_BIAS": not variant.split,
        "OPERAND": tl.float16 if variant.dtype == "fp16" else tl.bfloat16,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    if rows == 1:
        constants["m"] = 1
    kinds = {"x": f"*{variant.dtype}", "codes": "*i32", "scales": "*fp16", "table": "*i8", "bias": "*fp32"}
    kinds |= dict.fromkeys(("out", "y"), "*fp32" if variant.split else f"*{variant.dtype}")
    return kernel, constants, kinds, config.options


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread. Triton kernels hold no local arrays: a stack is spills."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            raise LowbitError(f"cannot read a compiled kernel back: cuobjdump: {error}") from None
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise LowbitError("cannot read a compiled kernel back: cuobjdump names no registers")
    return int(found[1]), int(found[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lowbit.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities (80 90)")
    parser.add_argument("--variants", choices=("small", "all"), default="small", help="a handful, or every one")
    args = parser.parse_args(argv)
    try:
        for arch in args.arch:
            for variant in SMALL if args.variants == "small" else ALL:
                usage = compile_variant(variant, arch)
                what = asdict(variant) if isinstance(variant, Variant) else {"table": variant}
                print(json.dumps({"arch": arch, **what, **asdict(usage)}), flush=True)
    except LowbitError as error:
        print(f"lowbit: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
