"""Every CUDA kernel once, on small ragged matrices, checked against fp64: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python bench/gpu_smoke.py
"""

from __future__ import annotations

import sys

import torch

from lowbit.kernels import cuda
from lowbit.kernels.config import NATIVE_TILES
from lowbit.kernels.tuned import random_weight, worst_error
from lowbit.tables import BITS


def main() -> int:
    launches = 0
    for bits in BITS:
        for group in (None, 64):
            w = random_weight(70, 328, bits, group, "cuda", bits)
            for dtype in (torch.float16, torch.bfloat16):
                for m, tile_m in [(1, 16), (16, 16), *((tile - 5, tile) for tile in NATIVE_TILES[1:])]:
                    x = torch.randn(m, 328, device="cuda").to(dtype)
                    for splits in (1, 2):
                        y = torch.full((m, 70), torch.nan, device="cuda")
                        cuda.linear(x, w, torch.zeros(70, device="cuda"), y, splits=splits, tile_m=tile_m)
                        error = worst_error(y, x, w)
                        if not error < 1e-5:
                            print(
                                f"smoke: wrong, {error:g}: {bits} bits, group {group}, {dtype}, M {m}, {splits} splits"
                            )
                            return 1
                        launches += 1
                if cuda.has_wgmma(x.device):
                    for splits in (1, 2):
                        y = torch.full((m, 70), torch.nan, device="cuda")
                        cuda.linear(x, w, None, y, splits=splits, wgmma=True)
                        if not worst_error(y, x, w) < 1e-5:
                            print(f"smoke: wrong by warp-group products: {bits} bits, group {group}, {dtype}")
                            return 1
                        launches += 2
            y = torch.empty((3, 70), dtype=torch.float16, device="cuda")
            cuda.dense(torch.randn(3, 328, device="cuda").half(), w, None, y)
            cuda.rows(w, torch.tensor([0, 69], device="cuda"))
            launches += 2
    torch.cuda.synchronize()
    print(f"smoke: {launches} launches are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
