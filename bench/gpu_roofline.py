"""What the CUDA kernels take, read back from their machine code without a GPU, and the bound that follows on paper.

    python bench/gpu_roofline.py --arch 80 90 --variants all --out docs/results/gpu_roofline.json

Needs nvcc, a C++ compiler and cuobjdump (Triton has one). For every kernel: registers, spills, shared memory, blocks a
multiprocessor (occupancy), instructions of the main loop a weight and lane. GEMV: the share of the memory bandwidth at
which the issue slots of all schedulers would be full, from the figures in MACHINES; a bound, no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Multiprocessors, boost clock in Hz, bytes/s of memory (vendor's data sheets), registers and bytes of shared memory a
# multiprocessor (CUDA programming guide); four schedulers each issue an instruction of a warp a clock.
MACHINES = {
    80: {
        "name": "A100 80GB SXM",
        "sms": 108,
        "hz": 1.41e9,
        "bytes": 2.039e12,
        "registers": 65536,
        "shared": 164 * 1024,
    },
    90: {"name": "H100 SXM", "sms": 132, "hz": 1.755e9, "bytes": 3.35e12, "registers": 65536, "shared": 228 * 1024},
}
FORMATS = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (8, 0)]  # bits, look-up
DTYPES = ("Fp16", "Bf16")
# One of everything that changes the code; what CI has time for.
SMALL_GEMV = [
    (1, 0, "Fp16", 1, 1),
    (2, 1, "Bf16", 1, 1),
    (4, 0, "Bf16", 2, 1),
    (8, 0, "Fp16", 2, 0),
    (4, 0, "Fp16", 1, 0),
]
SMALL_GEMM = [
    (1, 0, "Fp16", 0, 128),
    (2, 0, "Fp16", 0, 128),
    (4, 0, "Fp16", 1, 128),
    (4, 1, "Bf16", 1, 64),
    (8, 0, "Fp16", 0, 32),
]


def gemv_shapes(small: bool) -> list[tuple]:
    if small:
        return SMALL_GEMV
    return [(b, t, d, c, g) for b, t in FORMATS for d in DTYPES for c in (1, 2) for g in (0, 1)]


def gemm_shapes(small: bool) -> list[tuple]:
    if small:
        return SMALL_GEMM
    return [(b, t, d, g, m) for b, t in FORMATS for d in DTYPES for g in (0, 1) for m in (32, 64, 128)]


def instantiations(small: bool) -> list[tuple[str, str]]:
    """(line of C++ that names the shape, label) of every kernel."""
    lines = []
    for b, t, d, c, g in gemv_shapes(small):
        label = f"gemv {b} bits{' look-up' if t else ''} {d} M<={8 * c}{' grouped' if g else ''}"
        lines.append((f"GemvShape<{b}, {'true' if t else 'false'}, {d}, {c}, {'true' if g else 'false'}>", label))
    for b, t, d, g, m in gemm_shapes(small):
        label = f"gemm {b} bits{' look-up' if t else ''} {d} M tile {m}{' grouped' if g else ''}"
        table, grouped = ("true" if v else "false" for v in (t, g))
        tile = {32: "2, 4, 4, 1, 4, 3", 64: "2, 8, 4, 1, 4, 2", 128: "2, 8, 4, 2, 3, 1" if g else "4, 8, 2, 2, 3, 2"}[m]
        lines.append((f"GemmShape<{b}, {table}, {d}, {grouped}, {tile}>", label))
    return lines


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


def shapes_on_host(lines: list[tuple[str, str]], folder: Path) -> list[dict]:
    """Constants of the shapes, from the headers themselves: threads, shared bytes, weights of a loop pass a lane."""
    body = "\n".join(
        f'  std::printf("%d %d %d %d\\n", S{i}::kThreads, S{i}::kSharedBytes, {weights(shape, i)}, {stages(shape, i)});'
        for i, (shape, _) in enumerate(lines)
    )
    uses = "\n".join(f"using S{i} = {shape};" for i, (shape, _) in enumerate(lines))
    source = f"""#include <cstdio>\n#include "qgemm.cuh"\n#include "qgemv.cuh"\nusing namespace lowbit::gpu;\n{uses}
int main() {{\n{body}\n}}\n"""
    (folder / "shapes.cpp").write_text(source)
    compiler = os.environ.get("CXX", "c++")
    run(compiler, "-std=c++17", f"-I{SOURCES}", str(folder / "shapes.cpp"), "-o", str(folder / "shapes"))
    rows = [line.split() for line in run(str(folder / "shapes")).splitlines()]
    return [dict(zip(("threads", "shared", "weights", "stage_bytes"), map(int, row))) for row in rows]


def weights(shape: str, i: int) -> str:
    """Weights that a lane unpacks in one pass of its main loop."""
    return f"S{i}::kTiles * 32 * S{i}::kDepth" if shape.startswith("Gemv") else f"S{i}::kTilesN * 32"


def stages(shape: str, i: int) -> str:
    """Bytes of weights that a block has in flight."""
    if shape.startswith("Gemv"):
        return f"S{i}::kLoads * 16 * S{i}::kDepth * S{i}::kThreads"
    return f"S{i}::kUnitsW * 16 * (S{i}::kStages - 1)"


def compile_kernels(lines: list[tuple[str, str]], arch: int, folder: Path) -> list[dict]:
    """Registers, spills and machine code of every kernel, in the order of ``lines``."""
    text = '#include "qgemm.cuh"\n#include "qgemv.cuh"\nnamespace lowbit::gpu {\n'
    for i, (shape, _) in enumerate(lines):
        kernel = "qgemv_kernel" if shape.startswith("Gemv") else "qgemm_kernel"
        text += f"using S{i} = {shape};\ntemplate __global__ void {kernel}<S{i}>(LOWBIT_PARAM Args);\n"
    (folder / "kernels.cu").write_text(text + "}\n")
    cubin = folder / f"{arch}.cubin"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{SOURCES}", "-Xptxas", "-v", "-cubin"]
    log = run("nvcc", *flags, str(folder / "kernels.cu"), "-o", str(cubin))
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    for name, stack, spilled, registers in re.findall(pattern, log, re.S):
        found[name] = {"registers": int(registers), "stack": int(stack), "spilled": int(spilled)}
    sass = run(cuobjdump(), "-sass", str(cubin))
    for part in sass.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        found[name.strip()] |= main_loop(code)
    by_shape = {}
    for name, entry in found.items():
        by_shape[_demangled(name)] = entry
    return [by_shape[re.sub(r"\s", "", shape)] for shape, _ in lines]


def _demangled(name: str) -> str:
    """GemvShape<...> of a mangled kernel name, without spaces."""
    kind, inner = re.search(r"(Gem[vm]Shape)I(.*?)EEEEv", name).groups()
    out = []
    for token in re.findall(r"Li(\d+)E|Lb([01])E|NS0_4(Fp16|Bf16)E", inner + "E"):
        number, flag, dtype = token
        out.append(number or dtype or {"0": "false", "1": "true"}[flag])
    return f"{kind}<{','.join(out)}>"


def main_loop(code: str) -> dict:
    """Instructions between a backward branch and its target, of the longest loop that has tensor-core instructions."""
    instructions = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    best: list[str] = []
    for address, text in instructions:
        target = re.search(r"BRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?\.?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loop = [t for a, t in instructions if int(target[1], 16) <= a <= address]
            if any("HMMA" in t for t in loop) and len(loop) > len(best):
                best = loop
    names = [re.sub(r"^@!?U?P\w+\s+", "", t).split()[0].split(".")[0] for t in best]
    kinds = ("LOP3", "HFMA2", "SHF", "PRMT", "HMMA", "LDG", "LDS", "LDGSTS", "IMAD", "FFMA", "FADD", "F2FP")
    return {"loop": len(best), "of_which": {k: names.count(k) for k in kinds if k in names}}


def occupancy(entry: dict, machine: dict) -> int:
    """Blocks a multiprocessor holds, by registers (allocated by 256 a warp) and shared memory (1 KiB a block more)."""
    a_warp = -(-entry["registers"] * 32 // 256) * 256
    by_registers = machine["registers"] // (a_warp * (entry["threads"] // 32))
    return min(by_registers, machine["shared"] // (entry["shared"] + 1024), 2048 // entry["threads"])


def tables(kernels: list[dict]) -> dict[str, str]:
    """Markdown of the fp16 kernels on sm_90, for the page on them."""
    out = {}
    for kind, extra in (("gemv", " issue bound / bandwidth |"), ("gemm", "")):
        rows = [k for k in kernels if k["arch"] == 90 and k["kernel"].startswith(kind) and "Fp16" in k["kernel"]]
        lines = [
            f"| kernel | registers | spilled | shared KiB | blocks | KiB in flight | instructions a weight |{extra}"
        ]
        lines.append("|---|" + "---:|" * (6 + bool(extra)))
        for k in rows:
            line = (
                f"| {k['kernel'].replace(' Fp16', '')} | {k['registers']} | {k['spilled']} | {k['shared'] / 1024:.0f} "
                f"| {k['blocks_per_sm']} | {k['in_flight_per_sm'] / 1024:.0f} | {k['instructions_per_weight']:.2f} |"
            )
            lines.append(line + (f" {k['issue_bound_share']:.1f} |" if extra else ""))
        out[kind] = "\n".join(lines)
    return out


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
    lines = instantiations(args.variants == "small")
    result = []
    with tempfile.TemporaryDirectory() as folder:
        shapes = shapes_on_host(lines, Path(folder))
        for arch in args.arch:
            machine = MACHINES[arch]
            for (shape, label), host, entry in zip(lines, shapes, compile_kernels(lines, arch, Path(folder))):
                entry = {"arch": arch, "kernel": label} | host | entry
                entry["blocks_per_sm"] = occupancy(entry, machine)
                entry["instructions_per_weight"] = entry["loop"] / host["weights"]
                entry["in_flight_per_sm"] = entry["blocks_per_sm"] * host["stage_bytes"]
                if shape.startswith("Gemv"):
                    bits = int(label.split()[1])
                    issue = machine["sms"] * 4 * machine["hz"] * 32 / entry["instructions_per_weight"]  # weights/s
                    entry["issue_bound_share"] = issue * bits / 8 / machine["bytes"]
                result.append(entry)
                print(
                    f"sm_{arch} {label:38} {entry['registers']:3} registers {entry['spilled']} spilled "
                    f"{entry['shared'] / 1024:5.1f} KiB {entry['blocks_per_sm']} blocks "
                    f"{entry['in_flight_per_sm'] / 1024:4.0f} KiB {entry['instructions_per_weight']:5.2f} a weight"
                    + (f"  issue bound {entry['issue_bound_share']:4.1f}" if "issue_bound_share" in entry else "")
                )
    if args.out:
        compiler = run("nvcc", "--version").strip().splitlines()[-2]
        args.out.write_text(json.dumps({"nvcc": compiler, "machines": MACHINES, "kernels": result}, indent=1) + "\n")
    if args.page:
        write_page(args.page, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
