"""Tile sizes of the Triton kernels by (bits, bucket of rows): one bounded table, no autotuning at start-up.

The entries are set by reasoning (register, shared-memory and occupancy limits of sm_80 and sm_90, read back by
:mod:`lowbit.kernels.aot`), not by measurement on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.errors import LowbitError
from lowbit.tables import BITS

GEMV_MAX_ROWS = 16
REDUCE_BLOCK = 256  # outputs a program of the kernel that adds partial sums
BUCKETS = (1, 16, 64, 256, 1024, None)  # most rows of activations in a bucket; None: any number
_MAX_ACCUMULATOR = 256 * 128  # fp32 elements a program: 128 registers a thread at 8 warps
_MAX_SHARED = 160 * 1024  # bytes for pipelined tiles; sm_80 has 163 KiB, sm_90 227 KiB


@dataclass(frozen=True)
class KernelConfig:
    """How one launch cuts its matrices.

    Attributes:
        block_m: rows of activations a program: 1 (no tensor cores, GEMV only) or a power of two from 16 on.
        block_n: outputs a program, a power of two.
        block_k: inputs an iteration: 64 or 128. Where scales are grouped, the launcher lowers it to divide a group.
        warps: 1 to 16, a power of two; stages: depth of the load pipeline, 1 to 6.
        split_k: programs that share one output tile along K; 0 lets the launcher fill the GPU. GEMM has 1.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block_m", 1, 256), ("block_n", 16, 256), ("block_k", 64, 128), ("warps", 1, 16)
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high or value & (value - 1):
                raise LowbitError(f"{name} must be a power of two from {low} to {high}, not {value!r}")
        if 1 < self.block_m < 16:
            raise LowbitError(f"block_m must be 1 or at least 16 (tensor-core tiles), not {self.block_m}")
        if type(self.stages) is not int or not 1 <= self.stages <= 6:
            raise LowbitError(f"stages must be an integer from 1 to 6, not {self.stages!r}")
        if type(self.split_k) is not int or not 0 <= self.split_k <= 64:
            raise LowbitError(f"split_k must be an integer from 0 to 64, not {self.split_k!r}")
        if self.split_k != 1 and self.block_m > GEMV_MAX_ROWS:
            raise LowbitError(f"split_k is for block_m up to {GEMV_MAX_ROWS}, not {self.block_m}")
        if self.block_m * self.block_n > _MAX_ACCUMULATOR:
            raise LowbitError(f"an accumulator of {self.block_m} x {self.block_n} does not fit in registers")
        if self.shared_bytes > _MAX_SHARED:
            raise LowbitError(f"{self.shared_bytes} bytes of pipelined tiles exceed {_MAX_SHARED} of shared memory")

    @property
    def shared_bytes(self) -> int:
        """Upper bound for the pipelined tiles: 2-byte activations and codes of at most one byte."""
        return self.stages * self.block_k * (2 * self.block_m + self.block_n)

    @property
    def options(self) -> dict[str, int | bool]:
        """Compile options. Fused multiply-adds are asked for by name: Triton's default is about to change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def bucket_of(rows: int) -> int:
    """Index into BUCKETS for ``rows`` >= 1."""
    return next(i for i, most in enumerate(BUCKETS) if most is None or rows <= most)


# GEMV, one row: bytes in flight are what counts, so that a tile is 16 bytes a thread (8 at 1 bit, where each byte
# already takes 8 fp32 sums). GEMM: the usual tensor-core tiles. block_n is a multiple of 64, 32, 16, 16 at 1, 2, 4, 8
# bits: the outputs whose codes share 16-byte vectors.
_ROW_BLOCK_N = {8: 32, 4: 64, 2: 128, 1: 128}
CONFIGS: dict[tuple[int, int], KernelConfig] = {
    (bits, bucket): config
    for bits in BITS
    for bucket, config in enumerate((
        KernelConfig(1, _ROW_BLOCK_N[bits], 64, 4, 4, split_k=0),
        KernelConfig(16, 64, 64 if bits == 8 else 128, 4, 4, split_k=0),
        KernelConfig(64, 64, 64, 4, 4),
        KernelConfig(128, 64, 64, 8, 3),  # 4 warps spill on sm_80 where scales are grouped
        KernelConfig(128, 128, 64, 8, 3),
        KernelConfig(128, 128, 64, 8, 3),
    ))
}  # fmt: skip

# What serves (bits, bucket) on a GPU: "cuda" (csrc/cuda), "wgmma" (its kernel for sm_90, elsewhere "cuda"), "triton",
# or "dense" (panels of W unpacked to 16 bits and multiplied by the library, where that costs less than what its faster
# product gains). These are estimates, measured nowhere; `lowbit tune` measures.
ROUTES: dict[tuple[int, int], str] = {
    (bits, bucket): "dense" if most is None else "cuda" for bits in BITS for bucket, most in enumerate(BUCKETS)
}
ROUTE_NAMES = ("cuda", "wgmma", "triton", "dense")
NATIVE_TILES = (16, 32, 64, 128)  # rows of x a block of the CUDA kernels; 16 is the GEMV


def find_config(bits: int, rows: int, group: int, k: int) -> KernelConfig:
    """The table's entry for ``rows`` >= 1 rows of activations, with block_k lowered to divide a group."""
    return fit_group(CONFIGS[bits, bucket_of(rows)], group, k)


def fit_group(config: KernelConfig, group: int, k: int) -> KernelConfig:
    """``config`` with a block_k whose inputs share one scale: 64 where a group is an odd number of chunks."""
    if group < k and group % config.block_k:
        return replace(config, block_k=64)
    return config


def splits(config: KernelConfig, n: int, k: int, processors: int) -> int:
    """Programs along K a GEMV launches, at most one an iteration.

    ``split_k`` = 0: enough that every multiprocessor has 4 programs, but at least 4 iterations in each, below which
    writing and adding the partial sums costs more than the idle processors.
    """
    iterations = -(-k // config.block_k)
    if config.split_k:
        return min(config.split_k, iterations)
    blocks = -(-n // config.block_n)
    return max(1, min(4 * processors // blocks, iterations // 4, 16))


def native_blocks(bits: int, tile_m: int, m: int, padded_rows: int) -> int:
    """Tiles of y of a CUDA kernel (csrc/cuda/qgemv.cuh, dispatch.cuh)."""
    if tile_m == NATIVE_TILES[0]:
        return padded_rows // (32 if bits == 8 else 64)
    return -(-m // tile_m) * -(-padded_rows // 128)


def native_splits(bits: int, tile_m: int, m: int, padded_rows: int, k: int, processors: int) -> int:
    """Blocks that share one tile of y along K: the number with the least work in the busiest multiprocessor.

    A block costs its chunks and a fixed start and end, worth about 2 chunks for each of its warps that share K; partial
    sums that meet in memory are worth as much again.
    """
    gemv = tile_m == NATIVE_TILES[0]
    warps = (8 if m <= 8 else 4) if gemv else 1  # that divide K inside a block
    resident = 2 if gemv else {32: 3, 64: 2, 128: 2}[tile_m]
    slots, chunks = processors * resident, -(-k // 64)
    blocks = native_blocks(bits, tile_m, m, padded_rows)

    def cost(parts: int) -> float:
        return -(-blocks * parts // slots) * (-(-chunks // (parts * warps)) + (2 if parts == 1 else 4))

    return min(range(1, min(16, max(1, chunks // warps)) + 1), key=cost)
