"""Where things are: imports run downward, there are no cycles, and every folder says what it is for."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hydra_jax"

FLOORS = (
    "launch",
    "__init__",
    "api",
    "runtime",
    "usage",
    "comparison",
    "benchmarks",
    "report",
    "sweep",
    "analysis",
    "training",
    "weights",
    "engine",
    "store",
    "config",
    "parsing",
    "text",
    "core",
    "models",
    "limits",
    "errors",
    "version",
)
"""Folders and modules of the package from top to bottom; each imports only from those after it, and from itself."""

MOST_LINES = 400


def modules(directory=PACKAGE):
    return sorted(directory.rglob("*.py"))


def dotted(path):
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name):
    """The floor that a module of the package is on."""
    parts = name.split(".")
    if parts[0] != "hydra_jax":
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path):
    """The project's modules that a file imports, wherever in it: [(name, line)]."""
    known = {dotted(module) for module in modules()}
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        found += [(name, node.lineno) for name in names if name in known]
    return found


@pytest.mark.parametrize("path", [*modules(), *modules(ROOT / "launch")], ids=dotted)
def test_imports_run_downward(path):
    above = FLOORS.index(floor(dotted(path)))
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}, of a floor above {FLOORS[above]}"
        for name, line in imports(path)
        if FLOORS.index(floor(name)) < above
    ]
    assert not upward


def test_every_folder_and_module_has_a_floor():
    assert {floor(dotted(path)) for path in modules()} == set(FLOORS) - {"launch"}


def test_there_are_no_cycles():
    graph = {dotted(path): {name for name, _ in imports(path)} - {dotted(path)} for path in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("path", sorted(path for path in PACKAGE.rglob("__init__.py")), ids=dotted)
def test_a_folder_says_in_a_line_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring
    assert len(docstring.splitlines()) == 1


@pytest.mark.parametrize("path", [*modules(), *modules(ROOT / "launch"), *modules(ROOT / "tests")], ids=dotted)
def test_no_module_is_too_long(path):
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES, "split it"


FRAGMENT = re.compile(r"(Of|What|How|Where|Who|Which|That) ")
"""The beginning of a docstring whose subject a reader would have to guess."""


@pytest.mark.parametrize("path", [*modules(), *modules(ROOT / "launch"), *modules(ROOT / "configs")], ids=dotted)
def test_docstrings_name_the_thing_or_begin_with_a_verb(path):
    """Docstrings of modules, classes and functions, and the strings below constants."""
    fragments = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {str(node.value.value).splitlines()[0]}"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and FRAGMENT.match(str(node.value.value))
    ]
    assert not fragments
