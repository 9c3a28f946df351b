"""What the CUDA kernels take, read back from their machine code without a GPU, and the bounds that follow on paper.

    python bench/gpu_roofline.py --arch 80 90 --out docs/results/gpu_roofline.json --page docs/KERNELS_GPU.md

Needs nvcc, a C++ compiler and cuobjdump (Triton has one). For every kernel: registers, spills, shared memory, blocks a
multiprocessor (occupancy), instructions of the main loop a weight and lane. GEMV: the share of the memory bandwidth at
which the issue slots of all schedulers, or the integer units, would be full, from the figures in MACHINES; a bound, no
measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Multiprocessors, boost clock in Hz, bytes/s of memory (vendor's data sheets), registers, bytes of shared memory a
# multiprocessor and most of a block (CUDA programming guide). A multiprocessor issues 4 instructions of a warp a clock,
# of which 2 may be integer ones (guide, throughput of native arithmetic instructions: 64 results a clock).
_AMPERE = {"name": "A100 80GB SXM", "sms": 108, "hz": 1.41e9, "bytes": 2.039e12}
_HOPPER = {"name": "H100 SXM", "sms": 132, "hz": 1.755e9, "bytes": 3.35e12}
MACHINES = {
    80: _AMPERE | {"registers": 65536, "shared": 164 * 1024, "shared_block": 163 * 1024},
    90: _HOPPER | {"registers": 65536, "shared": 228 * 1024, "shared_block": 227 * 1024},
}
INTEGER = ("LOP3", "SHF", "PRMT", "IADD3", "VIADD", "ISETP", "LEA", "SEL", "F2FP")
FORMATS = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (8, 0)]  # bits, look-up
DTYPES = ("Fp16", "Bf16")
TILES = (32, 64, 128)
WGMMA = 129  # in place of a tile's rows: warp-group products, sm_90 only
# One of everything that changes the code; what CI has time for. (bits, look-up, dtype, grouped, rows)
SMALL = [
    (1, 0, "Fp16", 1, 8), (2, 1, "Bf16", 1, 8), (4, 0, "Bf16", 1, 16), (8, 0, "Fp16", 0, 16), (4, 0, "Fp16", 0, 8),
    (1, 0, "Fp16", 0, 128), (2, 0, "Fp16", 0, 128), (4, 0, "Fp16", 1, 128), (4, 1, "Bf16", 1, 64),
    (8, 0, "Fp16", 0, 32), (4, 0, "Fp16", 0, WGMMA), (2, 1, "Bf16", 1, WGMMA),
]  # fmt: skip
PAPER_SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
WANTED = {8: 0.85, 4: 0.85, 2: 0.75, 1: 0.60}  # share of the copy bandwidth
COPY_SHARE = 0.9  # of the data sheet's bandwidth: what large copies usually reach; an assumption
START_US = 2.0  # a kernel's start and end, when the one before has to end first; an assumption


def kernels(small: bool, arch: int) -> list[tuple]:
    """(bits, look-up, dtype, grouped, rows a block): 8 and 16 are the GEMV."""
    rows = (8, 16, *TILES, WGMMA)
    every = [(b, t, d, g, m) for m, (b, t), d, g in itertools.product(rows, FORMATS, DTYPES, (0, 1))]
    return [kernel for kernel in (SMALL if small else every) if arch >= 90 or kernel[4] != WGMMA]


def is_gemv(kernel: tuple) -> bool:
    return kernel[4] <= 16


def label(kernel: tuple) -> str:
    bits, table, dtype, grouped, rows = kernel
    kind = "gemv" if is_gemv(kernel) else "gemm"
    size = f"M<={rows}" if is_gemv(kernel) else "wgmma" if rows == WGMMA else f"M tile {rows}"
    return f"{kind} {bits} bits{' look-up' if table else ''} {dtype} {size}{' grouped' if grouped else ''}"


def shape_of(kernel: tuple) -> str:
    """The C++ type, of dispatch.cuh."""
    bits, table, dtype, grouped, rows = kernel
    table, grouped = ("true" if v else "false" for v in (table, grouped))
    if is_gemv(kernel):
        return f"GemvShape<{bits}, {table}, {dtype}, {rows // 8}, {grouped}>"
    if rows == WGMMA:
        return f"WgmmaShape<{bits}, {table}, {dtype}, {grouped}>"
    return f"GemmTile<{bits}, {table}, {dtype}, {grouped}, {rows}>"


def digest() -> str:
    """Of the kernels' code, without its comments and blanks: whether a result is of these sources."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh")))
    return hashlib.sha256(re.sub(r"//[^\n]*|\s+", "", text).encode()).hexdigest()[:16]


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"gpu_roofline: {' '.join(command)[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError):
        sys.exit("gpu_roofline: needs cuobjdump, of the CUDA toolkit or of Triton")


def shapes_on_host(wanted: list[tuple], folder: Path) -> list[dict]:
    """Constants of the shapes, from the headers themselves: threads, shared bytes, weights that a lane unpacks in one
    pass of its loop, bytes of weights that a block has in flight; and the shape's arguments, as its mangled name has
    them."""
    lines = []
    for i, kernel in enumerate(wanted):
        s = f"S{i}"
        if is_gemv(kernel):
            numbers = [f"{s}::kTiles * 32 * {s}::kDepth", f"{s}::kLoads * 16 * {s}::kDepth * {s}::kThreads"]
            arguments = [f"{s}::kColumns", f"{s}::kGrouped"]
        elif kernel[4] == WGMMA:  # a loop pass has two chunks
            numbers = ["2 * 32", f"{s}::kUnitsW * 16 * ({s}::kStages - 2)"]
            arguments = [f"{s}::kGrouped"]
        else:
            numbers = [f"{s}::kTilesN * 32", f"{s}::kUnitsW * 16 * ({s}::kStages - 1)"]
            names = ("kGrouped", "kTilesN", "kTilesM", "kWarpsN", "kWarpsM", "kStages", "kBlocks")
            arguments = [f"{s}::{name}" for name in names]
        values = [f"{s}::kThreads", f"{s}::kSharedBytes", *numbers, *arguments]
        lines.append(f'  std::printf("{" ".join(["%d"] * len(values))}\\n", {", ".join(values)});')
    uses = "\n".join(f"using S{i} = {shape_of(kernel)};" for i, kernel in enumerate(wanted))
    source = '#include <cstdio>\n#include "dispatch.cuh"\nusing namespace lowbit::gpu;\n'
    (folder / "shapes.cpp").write_text(source + uses + "\nint main() {\n" + "\n".join(lines) + "\n}\n")
    compiler = os.environ.get("CXX", "c++")
    run(compiler, "-std=c++17", f"-I{SOURCES}", str(folder / "shapes.cpp"), "-o", str(folder / "shapes"))
    found = []
    for kernel, line in zip(wanted, run(str(folder / "shapes")).splitlines()):
        threads, shared, weights, in_flight, *arguments = map(int, line.split())
        key = (kernel[0], kernel[1], kernel[2], *arguments)
        found.append({"threads": threads, "shared": shared, "weights": weights, "stage_bytes": in_flight, "key": key})
    return found


def compile_kernels(wanted: list[tuple], arch: int, folder: Path) -> dict[tuple, dict]:
    """Registers, spills and machine code of every kernel, by its shape's arguments."""
    text = '#include "dispatch.cuh"\nnamespace lowbit::gpu {\n'
    for i, kernel in enumerate(wanted):
        name = "qgemv" if is_gemv(kernel) else "qwgmma" if kernel[4] == WGMMA else "qgemm"
        args = "WgmmaArgs" if kernel[4] == WGMMA else "Args"
        text += f"using S{i} = {shape_of(kernel)};\n"
        text += f"template __global__ void {name}_kernel<S{i}>(LOWBIT_PARAM {args});\n"
    (folder / "kernels.cu").write_text(text + "}\n")
    cubin = folder / f"{arch}.cubin"
    target = "90a" if arch == 90 else str(arch)
    flags = ["-std=c++17", "-O3", f"-arch=sm_{target}", f"-I{SOURCES}", "-Xptxas", "-v", "-cubin"]
    log = run("nvcc", *flags, str(folder / "kernels.cu"), "-o", str(cubin))
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    for name, stack, spilled, registers in re.findall(pattern, log, re.S):
        found[name] = {"registers": int(registers), "stack": int(stack), "spilled": int(spilled)}
        # ptxas says so where warp-group products cannot overlap with what prepares the next ones.
        found[name]["serialized"] = bool(re.search(rf"serialized.*'{name}'", log))
    sass = run(cuobjdump(), "-sass", str(cubin))
    for part in sass.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        found[name.strip()] |= main_loop(code)
    return {_arguments(name): entry for name, entry in found.items()}


def _arguments(name: str) -> tuple:
    """Arguments of the shape in a mangled kernel name."""
    inner = re.search(r"(?:Gem[vm]|Wgmma)ShapeI(.*?)EEEEv", name)[1] + "E"
    tokens = re.findall(r"L[ib](\d+)E|NS0_4(Fp16|Bf16)E", inner)
    return tuple(dtype or int(number) for number, dtype in tokens)


def main_loop(code: str) -> dict:
    """Instructions between a backward branch and its target, of the longest loop that has tensor-core instructions;
    and loads that come before the wait for the previous kernel, where there is one."""
    instructions = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    best: list[str] = []
    for address, text in instructions:
        target = re.search(r"BRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?\.?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loop = [t for a, t in instructions if int(target[1], 16) <= a <= address]
            if any("HMMA" in t or "HGMMA" in t for t in loop) and len(loop) > len(best):
                best = loop
    wait = next((i for i, (_, text) in enumerate(instructions) if "ACQBULK" in text), 0)
    early = sum("LDG" in text or "STG" in text for _, text in instructions[:wait])
    names = [re.sub(r"^@!?U?P\w+\s+", "", t).split()[0].split(".")[0] for t in best]
    count = {"tensor": names.count("HMMA") + names.count("HGMMA"), "copies": names.count("LDG") + names.count("LDGSTS")}
    return {
        "loop": len(best),
        "integer": sum(n in INTEGER for n in names),
        "early_loads": early,
        "waits": wait > 0,
    } | count


def occupancy(entry: dict, machine: dict) -> int:
    """Blocks a multiprocessor holds, by registers (allocated by 256 a warp) and shared memory (1 KiB a block more)."""
    a_warp = -(-entry["registers"] * 32 // 256) * 256
    by_registers = machine["registers"] // (a_warp * (entry["threads"] // 32))
    return min(by_registers, machine["shared"] // (entry["shared"] + 1024), 2048 // entry["threads"])


def bound(entry: dict, machine: dict, bits: int) -> float:
    """Share of the memory bandwidth at which issue slots (4 a clock) or integer units (2 a clock) are full."""
    clocks = max(entry["instructions_per_weight"] / 4, entry["integer_per_weight"] / 2)
    return machine["sms"] * machine["hz"] * 32 / clocks * bits / 8 / machine["bytes"]


def examine(wanted: list[tuple], arch: int, folder: Path) -> list[dict]:
    """One record a kernel."""
    machine, compiled, result = MACHINES[arch], compile_kernels(wanted, arch, folder), []
    for kernel, host in zip(wanted, shapes_on_host(wanted, folder)):
        entry = compiled[host.pop("key")]
        weights, in_flight = host.pop("weights"), host.pop("stage_bytes")
        loop, integer = entry.pop("loop"), entry.pop("integer")
        record = {"arch": arch, "kernel": label(kernel)} | host | entry
        record["blocks_per_sm"] = occupancy(record, machine)
        record["in_flight_per_sm"] = record["blocks_per_sm"] * in_flight
        record["instructions_per_weight"] = round(loop / weights, 3)
        record["integer_per_weight"] = round(integer / weights, 3)
        if is_gemv(kernel):
            record["bound"] = round(bound(record, machine, kernel[0]), 3)
        result.append(record)
    return result


def tables(found: list[dict]) -> dict[str, str]:
    """Markdown of the fp16 kernels on sm_90, for the page on them."""
    out = {"paper": paper()}
    for kind, extra in (("gemv", " bound / bandwidth |"), ("gemm", "")):
        rows = [k for k in found if k["arch"] == 90 and k["kernel"].startswith(kind) and "Fp16" in k["kernel"]]
        rows.sort(key=lambda k: (k["kernel"].split()[1], "look-up" in k["kernel"]))
        lines = [
            f"| kernel | registers | spilled | shared KiB | blocks | KiB in flight | instructions a weight |{extra}",
            "|---|" + "---:|" * (6 + bool(extra)),
        ]
        for k in rows:
            line = (
                f"| {k['kernel'].replace(' Fp16', '')} | {k['registers']} | {k['spilled']} | {k['shared'] / 1024:.0f} "
                f"| {k['blocks_per_sm']} | {k['in_flight_per_sm'] / 1024:.0f} | {k['instructions_per_weight']:.2f} |"
            )
            lines.append(line + (f" {k['bound']:.2f} |" if extra else ""))
        out[kind] = "\n".join(lines)
    return out


def paper() -> str:
    """Markdown: what one row can reach on an H100 if memory is the only bound and a kernel costs START_US."""
    rate = COPY_SHARE * MACHINES[90]["bytes"]
    lines = [
        "| N x K | bits | us at the copy's rate | share wanted | with a start of 2 us | of 1 us "
        "| times fp16 without a start | with one of 2 us |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for n, k in PAPER_SHAPES:
        fp16 = 2 * n * k / rate * 1e6
        for bits, wanted in WANTED.items():
            us = (n * k * bits / 8 + 2 * n + 2 * (n + k)) / rate * 1e6
            shares = [us / (us + start) for start in (START_US, START_US / 2)]
            lines.append(
                f"| {n} x {k} | {bits} | {us:.1f} | {wanted:.2f} | {shares[0]:.2f} | {shares[1]:.2f} "
                f"| {fp16 / us:.1f} | {(fp16 + START_US) / (us + START_US):.1f} |"
            )
    return "\n".join(lines)


def write_page(page: Path, kernels: list[dict]) -> None:
    """Put the tables between their markers."""
    text = page.read_text(encoding="utf-8")
    for kind, table in tables(kernels).items():
        pattern = rf"(<!-- table:{kind} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if not count:
            sys.exit(f"gpu_roofline: {page} has no place for the table {kind}")
    page.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(MACHINES))
    parser.add_argument("--variants", choices=("small", "all"), default="all")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--page", type=Path, help="put its tables into this Markdown file")
    args = parser.parse_args(argv)
    for tool in ("nvcc", os.environ.get("CXX", "c++")):
        if not shutil.which(tool):
            sys.exit(f"gpu_roofline: needs {tool}")
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            for record in examine(kernels(args.variants == "small", arch), arch, Path(folder)):
                result.append(record)
                print(
                    f"sm_{arch} {record['kernel']:38} {record['registers']:3} registers {record['spilled']} spilled "
                    f"{record['shared'] / 1024:5.1f} KiB {record['blocks_per_sm']} blocks "
                    f"{record['in_flight_per_sm'] / 1024:4.0f} KiB {record['instructions_per_weight']:5.2f} a weight"
                    + (f"  bound {record['bound']:4.2f}" if "bound" in record else "")
                )
    if args.out:
        write(args.out, result)
    if args.page:
        write_page(args.page, result)
    return 0


def write(path: Path, result: list[dict]) -> None:
    """JSON with one line a kernel."""
    compiler = run("nvcc", "--version").strip().splitlines()[-2]
    head = {"nvcc": compiler, "sources": digest(), "machines": MACHINES}
    lines = ",\n".join("  " + json.dumps(record) for record in result)
    path.write_text(json.dumps(head)[:-1] + ', "kernels": [\n' + lines + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
