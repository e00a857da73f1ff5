"""The imports keep to the arrows of the README's map: who may import whom, and nothing hidden."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "bitwright"
LOW = {"spec", "registry", "files", "progress"}
RESULT = LOW | {"ops", "schemes", "recipe", "formats", "archs"}
TORCH = {"calib", "hf", "pipeline", "module", "evaluate", "plan", "estimate", "trial", "pool"}

# room -> rooms it may import; a room is a module or a package directly under bitwright.
ARROWS = {
    "errors": set(),
    "structure": set(),
    "spec": {"errors", "structure"},
    "registry": set(),
    "progress": set(),
    "deferred": set(),
    "files": {"spec"},
    "cgroup": set(),
    "ops": {"spec", "_core", "cgroup"},
    "grids": {"spec"},
    "archs": {"spec"},
    "schemes": {"spec", "registry"},
    "recipe": {"spec", "registry", "schemes"},
    "hessian": {"spec", "ops"},
    "solvers": {"spec", "ops", "hessian"},
    "transforms": {"spec", "ops"},
    "formats": {"spec", "registry", "schemes", "ops", "files", "archs"},
    "matrix": {"spec", "registry", "schemes", "ops"},
    "calib": {"spec", "ops", "files"},
    "clock": set(),
    "report": {"spec", "clock"},
    "hf": {"spec", "schemes", "archs", "recipe", "ops", "files", "formats", "calib", "matrix"},
    "card": {"report"},
    "papers": {"spec", "registry", "files", "export", "report", "card"},
    "spool": {"spec", "schemes", "ops", "files"},
    "export": {"spec", "ops", "files", "progress"},
    "job": RESULT | {"calib"},
    "fingerprint": {"ops", "calib", "job"},
    "solving": {"spec", "ops", "registry", "recipe", "hessian", "solvers", "transforms"}
    | {"job", "spool"},
    "bench": {"spec", "ops", "schemes", "solvers", "progress", "deferred", "show"}
    | {"files", "papers"},
    "sizes": {"spec", "recipe", "calib", "job"},
    "pool": {"ops"},
    "trial": {"spec", "ops", "calib"},
    "estimate": {"spec", "ops", "registry", "recipe", "calib", "transforms", "job", "sizes"}
    | {"trial"},
    "plan": {"spec", "cgroup", "files", "calib", "job", "sizes", "estimate", "pool"},
    "evaluate": {"spec", "registry", "ops", "files", "formats", "calib", "pool", "progress"},
    "inspection": {"spec", "registry", "archs", "files", "formats", "report", "papers"},
    "conversion": RESULT | {"calib", "job", "report", "export", "papers"},
    "pipeline": RESULT
    | {"calib", "clock", "export", "plan", "fingerprint", "job", "papers", "pool", "report"}
    | {"solving", "spool"},
    "module": RESULT | {"calib", "export", "matrix", "pipeline", "plan", "report"},
}
FREE = {
    "__init__",
    "__main__",
    "launch",
    "cli",
    "show",
    "demo",
    "options",
    "talk",
}  # the front doors: everything above
SIBLINGS = {"grids", "solvers", "transforms", "archs"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[tuple[str, ...]]:
    names = imports(ast.parse(path.read_text()))
    return {tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "bitwright"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    here = room(path)
    if here in FREE:
        return
    reached = {parts[0] for parts in ours(path) if parts} - {here}
    assert reached <= ARROWS[here], f"{path} may not import {reached - ARROWS[here]}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_siblings_do_not_know_each_other(path: Path) -> None:
    here = room(path)
    if here not in SIBLINGS or path.name == "__init__.py":
        return
    assert not any(parts[0] == here for parts in ours(path) if parts)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_imports_in_functions_and_no_asserts(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    hidden = [
        f"{path.name}:{node.lineno}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not hidden, f"imports inside functions: {hidden}"
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"{path} asserts in lines {asserts}: raise instead"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_stays_in_its_rooms(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    if heavy & {"torch", "transformers", "greenlet"}:
        assert room(path) in TORCH | FREE


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max((len(line) for line in lines), default=0) <= 100
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def cpp() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".def"})


def test_cpp_arrows() -> None:
    allowed = {"core": {"core"}, "kernels": {"core", "kernels"}, "ops": {"core", "kernels", "ops"}}
    for path in cpp():
        here = path.relative_to(ROOT / "csrc").parts[0]
        if here not in allowed:
            continue
        included = set(re.findall(r'#include "([a-z_]+)[/.]', path.read_text()))
        assert included <= allowed[here], f"{path} may not include {included - allowed[here]}"


def test_pybind_and_openmp_each_live_in_one_file() -> None:
    text = {path.name: path.read_text() for path in cpp()}
    assert [name for name, body in text.items() if "pybind11" in body] == ["bind.cpp"]
    assert [name for name, body in text.items() if "#pragma omp" in body] == ["parallel.h"]
