"""The rules of the house, checked on the sources: who may import whom, file lengths, names, lazy imports."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from modules before it (docs/ARCHITECTURE.md); those of one group know nothing of each other.
LAYERS = [
    ["errors"], ["files"], ["streams"], ["tables"], ["bitpack"], ["quantize"], ["config"], ["plan"], ["vocab"],
    ["container_checks"], ["container_header"], ["container"],
    ["tuning"], ["kernels", "_C", "pages"], ["ops"], ["layers"], ["gpu_layers"], ["model"], ["checkpoint"], ["loading"],
    ["forest"], ["backend"], ["native", "cuda"], ["state"], ["engine"],
    ["align"], ["normalize"], ["wer"], ["significance"], ["nbest_record"], ["nbest_json", "nbest_tables", "lattice"],
    ["nbest"], ["transcripts"], ["tune"], ["ngram"], ["weights"], ["rescore"], ["tune_weights"], ["ctc"],
    ["tools"],
]  # fmt: skip
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
MAX_LINES = 400
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def module_files() -> list[tuple[str, Path]]:
    """Every Python source with the group it belongs to: a module of lowbit, "kernels" or "tools"."""
    runtime = [(path.stem, path) for path in (ROOT / "lowbit").glob("*.py") if path.stem != "__init__"]
    offline = [(folder, path) for folder in ("kernels", "tools") for path in (ROOT / folder).rglob("*.py")]
    return sorted(runtime + offline, key=lambda item: item[1])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions too; ``from a import b`` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, from lowbit"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(("group", "path"), module_files(), ids=lambda v: str(getattr(v, "name", v)))
def test_imports_run_one_way(group, path):
    assert group in RANK, f"{path.name}: give the new module its place in LAYERS"
    for line, name in imports(path):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line}: imports {name}"
        assert parts[0] not in ("kernels", "tools", "tests", "bench"), f"{where}: the package is lowbit.{parts[0]}"
        if parts[0] != "lowbit" or len(parts) == 1 or parts[1] not in RANK:
            continue
        inside = parts[1] == group and group in ("kernels", "tools")
        assert RANK[parts[1]] < RANK[group] or inside, f"{where}: {group} may not import {parts[1]}"


def test_no_import_escapes_the_rule(tmp_path):
    """The walk sees imports wherever they stand, however they are spelled."""
    (tmp_path / "x.py").write_text(
        "if TYPE_CHECKING:\n    from lowbit.tools import x as y\ndef f():\n    import lowbit.engine as e\n"
        "    from lowbit import rescore\n"
    )
    assert {name for _, name in imports(tmp_path / "x.py")} == {"lowbit.tools.x", "lowbit.engine", "lowbit.rescore"}


def stages() -> dict[str, str]:
    from lowbit.tools.cli import STAGES

    return {name: text for name, text in STAGES.items() if (ROOT / "tools" / f"{name}.py").exists()}


@pytest.mark.parametrize("path", sorted((ROOT / "tools").rglob("*.py")), ids=lambda p: p.name)
def test_no_stage_imports_another_stage(path):
    for line, name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["lowbit", "tools"] and len(parts) > 2 and parts[2] in stages():
            raise AssertionError(f"{path.relative_to(ROOT)}:{line}: imports the stage {parts[2]}")


@pytest.mark.parametrize("stage", stages())
def test_a_stage_is_one_file_with_main(stage):
    path = ROOT / "tools" / f"{stage}.py"
    functions = {n.name: n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}
    assert "main" in functions, f"{path.name} has no main(argv)"
    main = functions["main"].args
    assert [a.arg for a in main.args] == ["argv"] and len(main.defaults) == 1
    assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


def test_no_tool_bears_the_name_of_a_standard_module():
    """`python tools/x.py` puts tools/ first on sys.path, where it would shadow the standard library."""
    names = {path.stem for path in (ROOT / "tools").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & set(sys.stdlib_module_names)


def test_file_lengths():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are sources is not known")
    paths = [ROOT / name for name in listed.splitlines() if name.endswith(SOURCES)]
    lengths = {p: len(p.read_bytes().splitlines()) for p in paths if p.exists()}
    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES}
    assert paths and not too_long, f"files above {MAX_LINES} lines: split them: {too_long}"


def python(code: str) -> str:
    """Run ``code`` in a fresh interpreter that sees installed packages only (-I: PYTHONSAFEPATH=1 on any version)."""
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_bare_names_are_not_importable_here():
    found = [name for name in ("tools", "kernels") if importlib.util.find_spec(name)]
    assert not found, f"{found} importable: run the tests with PYTHONSAFEPATH=1"


def test_bare_names_are_not_installed():
    code = "import importlib.util as u; print([n for n in ('tools', 'kernels') if u.find_spec(n)])"
    assert python(code) == "[]"
    assert python("import lowbit.tools, lowbit.kernels; print('ok')") == "ok"


def test_importing_lowbit_is_cheap():
    heavy = ("torch", "numpy", "triton", "safetensors", "rich", "lowbit.quantize", "lowbit._C")
    assert python(f"import sys, lowbit; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_public_names_load_without_gpu_work():
    """Every exported name resolves, `lowbit.quantize` stays the function, and neither CUDA nor Triton is touched."""
    code = (
        "import sys, lowbit\n"
        "values = [getattr(lowbit, n) for n in lowbit.__all__]\n"
        "import torch, lowbit.quantize\n"
        "assert callable(lowbit.quantize) and all(v is not None for v in values)\n"
        "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules\n"
        "print(len(values))"
    )
    assert int(python(code)) > 10


def test_safe_path_is_set_for_child_processes():
    """Tests that start Python rely on it; `make test` sets it."""
    if os.environ.get("PYTHONSAFEPATH"):
        assert sys.version_info < (3, 11) or sys.flags.safe_path
