"""Data parallelism over ``torchrun`` processes: the batch is split, gradients are summed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


class Parallel:
    """This process's place among the processes that ``torchrun`` started; alone without it."""

    def __init__(self, device: torch.device):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """All-reduce every gradient in one flat buffer (one message instead of one per tensor)."""
        if self.world == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)

    def sum(self, *values: float) -> list[float]:
        """Sums of numbers over all processes, in fp64."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """One value of every process, by rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
