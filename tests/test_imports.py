"""Who may import whom: the table of docs/architecture.md, read from the source of every module, functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELVES = {"megatron_jet": ROOT, "jet_kernels": ROOT / "kernels", "jet_launcher": ROOT / "launcher"}

# Package -> packages of ours that it may import. What one may import, its importers may import too (`_closure`).
MAY_IMPORT = {
    "configs": ("jet_kernels.hopper",),
    "jet_kernels": ("jet_kernels.hopper",),
    "jet_kernels.hopper": (),  # what an environment lacks, without torch
    "mixers": ("jet_kernels", "configs"),
    "model": ("mixers",),
    "data": ("configs", "tasks", "data.index", "data.checks"),  # shards of the synthetic tasks
    "data.index": ("configs", "tasks"),  # its vocabulary
    "data.checks": ("configs", "data.index"),  # before a run starts, without torch
    "tasks": ("configs",),
    "tasks.evalset": ("tasks", "data"),  # reads its sequences from shards
    "training": ("model", "data"),
    "convert": ("model", "mixers", "convert.hf"),
    "convert.hf": (),
    "convert.verify": ("convert", "training"),  # runs the Megatron model beside the HF model
    "evaluation": ("convert", "tasks.evalset"),
    "postnas": ("training", "convert", "evaluation"),
    "run_stage": ("postnas",),
    "teacher": ("training", "convert", "evaluation"),
    "jet_launcher": ("configs", "data.index", "data.checks"),
}
# Third-party packages that some packages must do with.
ONLY_THIRD_PARTY = {
    "configs": {"pydantic", "pydantic_core", "yaml"},
    "data.index": {"pydantic"},
    "data.checks": set(),
    "jet_kernels": {"torch", "triton", "fla"},
    "jet_kernels.hopper": set(),
    "convert.hf": {"torch", "transformers", "huggingface_hub", "fla"},
    "jet_launcher": {"pydantic", "yaml", "typer", "rich", "numpy", "nemo_run", "huggingface_hub"},
    "evaluation.report": {"jinja2", "matplotlib", "numpy", "markupsafe"},
}


def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    found = {}
    for package, shelf in SHELVES.items():
        for path in sorted((shelf / package).rglob("*.py")):
            parts = path.relative_to(shelf).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def area(module: str) -> str:
    """The row of the table that a module belongs to: the longest that fits, else its package."""
    name = module.removeprefix("megatron_jet.")
    rows = [row for row in MAY_IMPORT if f"{name}.".startswith(f"{row}.")]
    return max(rows, key=len) if rows else name.split(".")[0]


def imports_of(module: str) -> set[str]:
    """Full names of everything that a module imports anywhere in its text; relative imports resolved."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names}
    return names


def _closure(package: str) -> set[str]:
    allowed = {package}
    for other in MAY_IMPORT[package]:
        allowed |= _closure(other)
    return allowed


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in SHELVES and name in MODULES}


@pytest.mark.parametrize("module", [name for name in MODULES if area(name) in MAY_IMPORT])
def test_table_of_who_may_import_whom(module):
    allowed = _closure(area(module))
    wrong = sorted(name for name in ours(imports_of(module)) if area(name) not in allowed)
    assert not wrong, f"{module} may import {sorted(allowed)} only, not {wrong}"


def test_every_package_has_a_row():
    areas = {area(name) for name in MODULES} - {"megatron_jet"}
    assert areas <= set(MAY_IMPORT), f"add {sorted(areas - set(MAY_IMPORT))} to the table here and in the docs"


def test_third_party_imports_of_the_light_packages():
    for module in MODULES:
        rows = [row for row in ONLY_THIRD_PARTY if f"{module}.".startswith((f"megatron_jet.{row}.", f"{row}."))]
        for row in rows:
            tops = {name.split(".")[0] for name in imports_of(module)} - set(SHELVES) - {""}
            foreign = sorted(tops - set(sys.stdlib_module_names) - ONLY_THIRD_PARTY[row])
            assert not foreign, f"{module} may use {sorted(ONLY_THIRD_PARTY[row])} only, not {foreign}"


def test_references_stand_alone():
    """The exporter copies them beside the modeling code."""
    references = [name for name in MODULES if area(name) == "jet_kernels" and name.endswith(".reference")]
    assert references
    for module in references:
        tops = {name.split(".")[0] for name in imports_of(module)}
        assert tops <= set(sys.stdlib_module_names) | {"torch"}, module


def test_no_module_imports_itself_in_a_circle():
    graph = {name: ours(imports_of(name)) - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_init_files_hold_no_code():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), name


def test_shelves_and_tests_are_not_packages():
    for folder in ("kernels", "launcher", "tools", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("packages", ["megatron_jet.configs", "jet_launcher", "megatron_jet.evaluation.report"])
def test_light_packages_import_with_torch_blocked(packages):
    names = [name for name in MODULES if f"{name}.".startswith(f"{packages}.")]
    # NeMo-Run is imported by the one module that submits; a login node has it, this test does without.
    names = [name for name in names if "nemo_run" not in {n.split(".")[0] for n in imports_of(name)}]
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "triton", "fla"):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
sys.path[:0] = {[str(path) for path in SHELVES.values()]!r}
for name in {names!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
