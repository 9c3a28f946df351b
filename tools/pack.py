"""Write a checkpoint as a packed low-bit model (DESIGN sections 3 and 4).

Three ways, told apart by the checkpoint itself: an ADMM checkpoint of residual 0 is packed without loss, which is
verified weight by weight; one whose residual is not 0 is projected, if asked; a full-precision one is rounded
after training, with a plan.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table as RichTable

import lowbit
from lowbit.checkpoint import Checkpoint
from lowbit.container import PackedMatrix, PackedModel, read_header, write_packed
from lowbit.errors import LowbitError
from lowbit.files import PathLike, check_writable
from lowbit.loading import PACKED_SUFFIX
from lowbit.plan import MatrixPlan, Plan
from lowbit.quantize import QuantTensor, check_group, fit, nearest_codes, quantize, table_tensor
from lowbit.tables import find_table
from lowbit.tools import cli
from lowbit.tools.provenance import padded

METHODS = {
    "lossless": "codes and scales of the checkpoint, verified weight by weight",
    "projected": "weights rounded to the checkpoint's plan: not what training ended with",
    "post-training": "full-precision weights rounded by least squares",
}


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "pack",
        "lowbit pack admm.safetensors --out model.lowbit\n"
        "lowbit pack fp.safetensors --plan plan.json --group 64 --out model.lowbit   (post-training)",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint of lowbit train or lowbit admm")
    p.add_argument("--plan", metavar="PLAN.json", help="precision of every matrix, for full-precision weights")
    p.add_argument("--project", action="store_true", help="round weights that ADMM left off their levels")
    p.add_argument("--group", type=int, metavar="G", help="weights per scale, a multiple of 64 (default: the plan's)")
    p.add_argument("--out", required=True, metavar="MODEL.lowbit", help="file to write")
    return p


@dataclass(frozen=True)
class Packing:
    """How a checkpoint becomes codes: ``method`` is a key of METHODS."""

    method: str
    plan: Plan


def choose(checkpoint: Checkpoint, where: str, plan: Plan | None, project: bool) -> Packing:
    """Decide how to pack.

    Args:
        where: the checkpoint's file name, for errors.
        plan: the plan that was asked for, None for the checkpoint's own.

    Raises:
        LowbitError: no plan, or a loss that was not asked for.
    """
    if plan:
        plan.validate(checkpoint.config)
    if checkpoint.plan is None:
        if plan is None:
            raise LowbitError(
                f"{where}: full-precision weights need a plan: give --plan plan.json (lowbit allocate or lowbit nas"
                " make one), or train them into one with lowbit admm"
            )
        return Packing("post-training", plan)
    other = plan is not None and dict(plan) != dict(checkpoint.plan)
    exact = checkpoint.residual == 0
    if (other or not exact) and not project:
        reason = "was trained for another plan than the one given" if other else f"has {_residual(checkpoint)}"
        raise LowbitError(f"{where}: {reason}, so packing would change its weights; --project does so anyway")
    if exact and not other:
        return Packing("lossless", checkpoint.plan)
    return Packing("projected", plan or checkpoint.plan)


def pack_checkpoint(checkpoint: Checkpoint, packing: Packing, info: dict[str, Any] | None = None) -> PackedModel:
    """Quantize every matrix of ``checkpoint``.

    Raises:
        LowbitError: ``packing`` is lossless and a weight is no level times its scale; the matrix is named.
    """
    matrices = {}
    for name in cli.track(checkpoint.config.matrix_shapes(), "pack", unit="matrix"):
        weight = checkpoint.tensors[f"{name}.weight"]
        entry = packing.plan[name]
        if packing.method == "lossless":
            q = recover(name, weight, entry, checkpoint.scales[name])
        else:
            same = checkpoint.plan is not None and checkpoint.plan[name] == entry
            q = _round(weight, entry, checkpoint.scales.get(name) if same else None)
        matrices[name] = PackedMatrix.from_quant_tensor(q)
        if packing.method == "lossless" and not torch.equal(matrices[name].to_quant_tensor().dequantize(), weight):
            raise LowbitError(f"matrix {name!r}: the packed codes do not give back the checkpoint's weights")
    vectors = {name: checkpoint.tensors[name] for name in checkpoint.config.vector_shapes()}
    made_by = padded({"lowbit": lowbit.__version__, "method": packing.method, **(info or {})})
    return PackedModel(checkpoint.config, checkpoint.vocab, matrices, vectors, checkpoint.fp32_nbytes, made_by)


def recover(name: str, weight: torch.Tensor, entry: MatrixPlan, scale: torch.Tensor) -> QuantTensor:
    """The codes of ``weight`` fp32 [N, K] that already is level * scale, scale fp16 [N, G]; bit for bit.

    Raises:
        LowbitError: a weight is not.
    """
    table, k = find_table(entry.bits, entry.table), weight.shape[1]
    group = min(entry.group or k, k)
    spread = scale.float().repeat_interleave(group, dim=1)[:, :k]
    q = QuantTensor(nearest_codes(weight / spread, table), table_tensor(table), scale, entry.bits, group, table.name)
    wrong = q.dequantize() != weight
    if bool(wrong.any()):
        n, k = wrong.nonzero()[0].tolist()
        raise LowbitError(
            f"matrix {name!r}: {int(wrong.sum())} weights (first: row {n}, column {k}) are no level of"
            f" {entry.table!r} times their scale, although the checkpoint claims residual 0: it was edited"
        )
    return q


def _round(weight: torch.Tensor, entry: MatrixPlan, start: torch.Tensor | None) -> QuantTensor:
    """Least-squares fit; ``start`` fp16 [N, G] are the scales that training ended with, None without training."""
    if start is None:
        return quantize(weight, entry.bits, entry.table, entry.group)
    table, k = find_table(entry.bits, entry.table), weight.shape[1]
    codes, scale = fit(weight, table, entry.group, start=start)
    return QuantTensor(codes, table_tensor(table), scale, entry.bits, min(entry.group or k, k), table.name)


def _residual(checkpoint: Checkpoint) -> str:
    return "no residual" if checkpoint.residual is None else f"residual {checkpoint.residual:.3g}"


def body(args: argparse.Namespace) -> dict[str, Any]:
    if not args.out.endswith(PACKED_SUFFIX):
        raise LowbitError(f"--out {args.out}: the name of a packed model ends in {PACKED_SUFFIX}")
    check_writable(args.out)
    checkpoint = Checkpoint.load(args.checkpoint)
    plan = Plan.load(args.plan) if args.plan else None
    if args.group is not None:
        plan = with_group(plan or checkpoint.plan, args.group)
    if plan:
        plan.validate(checkpoint.config, args.plan or args.checkpoint)
    packing = choose(checkpoint, args.checkpoint, plan, args.project)
    info = {"checkpoint": checkpoint.info, "plan": packing.plan.source}
    try:
        model = pack_checkpoint(checkpoint, packing, info)
    except LowbitError as error:
        raise LowbitError(f"{args.checkpoint}: {error}") from None
    write_packed(args.out, model)
    result = summary(args.out, model, checkpoint)
    _print(cli.console(args), args.out, result)
    return result


def with_group(plan: Plan | None, group: int) -> Plan | None:
    """``plan`` with ``group`` weights per scale in every matrix."""
    check_group(group)
    if plan is None:
        return None
    return Plan({name: MatrixPlan(e.bits, e.table, group) for name, e in plan.items()}, plan.source)


def summary(path: PathLike, model: PackedModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes of the written file, and what rounding did: relative errors ||W - Q|| / ||W|| by kind of matrix."""
    header = read_header(path)
    kinds: dict[tuple[int, str, int], list[float]] = {}
    for name, matrix in model.matrices.items():
        weight = checkpoint.tensors[f"{name}.weight"]
        error = matrix.to_quant_tensor().dequantize() - weight
        row = (1, weight.numel(), matrix.nbytes, float(error.square().sum()), float(weight.square().sum()))
        kind = (matrix.bits, matrix.table.name, 0 if matrix.group == matrix.shape[1] else matrix.group)
        kinds[kind] = [a + b for a, b in zip(kinds.get(kind, [0] * len(row)), row)]
    rows = [
        {
            "bits": bits, "table": table, "group": group or None, "matrices": count, "weights": weights,
            "nbytes": nbytes, "relative_error": math.sqrt(error / norm) if norm else 0.0,
        }
        for (bits, table, group), (count, weights, nbytes, error, norm) in sorted(kinds.items())
    ]  # fmt: skip
    rounding = [float((v - v.half().float()).abs().max()) for v in model.vectors.values()]
    return {
        "out": str(path), "method": model.info["method"], "nbytes": header.file_nbytes,
        "fp32_nbytes": header.fp32_nbytes, "ratio": header.ratio, "mean_bits": header.mean_bits,
        "fp16_vector_error": max(rounding), "kinds": rows,
    }  # fmt: skip


def _print(console: Any, path: str, result: dict[str, Any]) -> None:
    table = RichTable(title=f"{path}: {METHODS[result['method']]}", title_justify="left")
    for column in ("bits", "table", "group", "matrices", "weights", "bytes", "‖W−Q‖/‖W‖"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for row in result["kinds"]:
        table.add_row(
            str(row["bits"]), row["table"], str(row["group"] or "row"), str(row["matrices"]), f"{row['weights']:,}",
            cli.format_bytes(row["nbytes"]), f"{row['relative_error']:.4f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{cli.format_bytes(result['fp32_nbytes'])} fp32 -> {cli.format_bytes(result['nbytes'])}, every byte counted:"
        f" {result['ratio']:.2f} times smaller, {result['mean_bits']:.3f} bits a weight before scales;"
        f" biases and norms as fp16 {_vector_text(result['fp16_vector_error'])}"
    )


def _vector_text(error: float) -> str:
    return f"change by {error:.1g} at most" if error else "are exact"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
