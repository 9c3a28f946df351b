"""Print what a packed model holds: its matrices, bits, bytes, and how much smaller than fp32 it is."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from lowbit.container import Header, PackedFile, read_header
from lowbit.tools import cli
from lowbit.tools.provenance import unpadded


def parser() -> argparse.ArgumentParser:
    p = cli.parser("show", "lowbit show model.lowbit --verify")
    p.add_argument("model", metavar="MODEL.lowbit", help="packed file of lowbit pack")
    p.add_argument("--verify", action="store_true", help="read every tensor and check its checksum and values")
    return p


def describe(header: Header) -> dict[str, Any]:
    """The header as JSON: one row per matrix, in the order of the forward pass, and totals in bytes."""
    matrices = [
        {
            "name": name, "shape": list(m.shape), "bits": m.bits, "table": m.table.name,
            "group": None if m.group == m.shape[1] else m.group, "nbytes": m.nbytes,
            "ratio": 4 * math.prod(m.shape) / m.nbytes,
        }
        for name, m in header.matrices.items()
    ]  # fmt: skip
    payload = sum(m["nbytes"] for m in matrices)
    vectors = sum(header.entries[name].nbytes for name in header.config.vector_shapes())
    vocab = header.entries["vocab"].nbytes
    return {
        "config": header.config.to_dict(), "vocab_size": header.config.vocab_size, "vocab_sha256": header.vocab_sha256,
        "matrices": matrices, "matrices_nbytes": payload, "vectors_nbytes": vectors, "vocab_nbytes": vocab,
        "header_nbytes": header.file_nbytes - payload - vectors - vocab, "nbytes": header.file_nbytes,
        "fp32_nbytes": header.fp32_nbytes, "ratio": header.ratio, "mean_bits": header.mean_bits,
        "n_parameters": header.config.n_parameters(), "made_by": unpadded(header.made_by),
    }  # fmt: skip


def verify(path: str) -> int:
    """Read and check every tensor; returns how many there are. Raises FormatError naming the first bad one."""
    with PackedFile(path) as file:
        file.vocab()
        for name in cli.track(file.header.matrices, "verify", unit="matrix"):
            file.matrix(name)
        for name in file.header.config.vector_shapes():
            file.vector(name)
        return len(file.header.entries)


def body(args: argparse.Namespace) -> dict[str, Any]:
    result = describe(read_header(args.model))
    if args.verify:
        result["verified_tensors"] = verify(args.model)
    _print(cli.console(args), args.model, result)
    return result


def _print(console: Any, path: str, result: dict[str, Any]) -> None:
    table = RichTable(title=Text(path), title_justify="left")
    for column in ("matrix", "shape", "bits", "table", "group", "bytes", "× smaller"):
        table.add_column(column, justify="left" if column in ("matrix", "table") else "right")
    for m in result["matrices"]:
        table.add_row(
            m["name"], "{} × {}".format(*m["shape"]), str(m["bits"]), m["table"], str(m["group"] or "row"),
            f"{m['nbytes']:,}", f"{m['ratio']:.2f}",
        )  # fmt: skip
    console.print(table)
    c = result["config"]
    lines = {
        "model": f"{c['n_layers']} layers, d {c['d_model']}, FFN {c['d_ffn']}, {c['n_heads']} heads, {c['norm']}-LN,"
        f" {c['activation']}, {c['position']}, {'tied' if c['tied'] else 'untied'},"
        f" {result['n_parameters']:,} parameters",
        "vocabulary": f"{result['vocab_size']:,} words, sha256 {ascii(result['vocab_sha256'])[1:13]}",
        "bits": f"{result['mean_bits']:.3f} a weight before scales",
        "bytes": f"{result['nbytes']:,} = matrices {result['matrices_nbytes']:,} + fp16 vectors"
        f" {result['vectors_nbytes']:,} + vocabulary {result['vocab_nbytes']:,} + header {result['header_nbytes']:,}",
        "ratio": f"{result['ratio']:.2f} times smaller than the fp32 checkpoint of {result['fp32_nbytes']:,} bytes",
        # ASCII JSON: a hostile file cannot send control characters to the terminal.
        "made by": json.dumps(result["made_by"]),
    }
    if "verified_tensors" in result:
        lines["verified"] = f"{result['verified_tensors']} tensors: checksums, padding, codes and scales are right"
    for name, text in lines.items():
        console.print(Text(f"{name:11}{text}"), soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
