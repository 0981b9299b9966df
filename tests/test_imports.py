"""How the package's modules import one another, and what its front loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metaopt

FRONT = "metaopt"
PACKAGE = Path(metaopt.__file__ or "").parent
LATE = ("higher", "torchopt", "sklearn", "matplotlib", "tensorboard", "torchmetrics", "scipy", "hydra")
"""Libraries that wait for the call that needs them, also where methods are built and adapters run."""
LATER_THAN_THE_FRONT = ("timm", "torchvision", "omegaconf", "rich")


def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package's is that of its ``__init__.py``."""
    named = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imported(source: str, known: set[str], package: str = FRONT) -> set[str]:
    """The known modules that a module's text imports, wherever in it: in a function, or for type checkers alone.

    A name taken from a package is its submodule where there is one, else the package's own. ``package``: the one that a
    relative import starts from.
    """
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{home}.{alias.name}" for alias in node.names}
            found |= (submodules & known) | ({home} if submodules - known else set())
    return found & known


def import_graph() -> dict[str, set[str]]:
    """The modules that each one imports; the front, which takes in all, is left out."""
    files = module_files()
    graph = {}
    for name, file in files.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = imported(file.read_text(encoding="utf-8"), set(files), package)
    del graph[FRONT]
    return graph


def edges_in_circles(graph: dict[str, set[str]]) -> list[str]:
    """Every import through which a module reaches itself."""

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph.get(name, ())
        return seen

    return sorted(f"{name} -> {other}" for name in graph for other in graph[name] if name in reached(other))


def test_no_module_reaches_itself_through_imports() -> None:
    graph = import_graph()
    assert graph["metaopt.policy.step"] >= {"metaopt.policy.part", "metaopt.types"}  # there is something to walk
    assert edges_in_circles(graph) == []


def test_no_module_imports_the_front() -> None:
    assert [name for name, others in import_graph().items() if FRONT in others] == []


def test_imports_are_found_wherever_they_are() -> None:
    known = {"metaopt", "metaopt.a", "metaopt.b", "metaopt.c", "metaopt.c.d", "metaopt.e", "metaopt.f"}
    source = """
from typing import TYPE_CHECKING
import torch, metaopt.a
from metaopt import b
from metaopt.c import d, Name
if TYPE_CHECKING:
    from metaopt.e import Name
def function():
    class Inner:
        from . import f
"""
    assert imported(source, known) == {"metaopt.a", "metaopt.b", "metaopt.c", "metaopt.c.d", "metaopt.e", "metaopt.f"}
    assert imported("from metaopt.c.d import Name", known) == {"metaopt.c.d"}
    assert imported("from ..e import Name", known, "metaopt.c") == {"metaopt.e"}
    assert imported("from metaopt import Name", known) == {"metaopt"}
    assert edges_in_circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b -> c", "c -> b"]


def loaded_by(code: str) -> set[str]:
    """Top-level packages that are loaded in a new process after some lines of code."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def by_the_front() -> set[str]:
    return loaded_by("import metaopt")


@pytest.fixture(scope="module")
def by_an_adapter() -> set[str]:
    return loaded_by("import metaopt; metaopt.OnlineAdapter, metaopt.build_method")


@pytest.mark.parametrize("library", LATE + LATER_THAN_THE_FRONT)
def test_importing_the_package_alone_loads_no_other_library(by_the_front: set[str], library: str) -> None:
    assert "metaopt" in by_the_front and library not in by_the_front


@pytest.mark.parametrize("library", LATE)
def test_building_methods_and_adapters_loads_no_library_of_other_tasks(by_an_adapter: set[str], library: str) -> None:
    assert {"metaopt", "torch"} <= by_an_adapter and library not in by_an_adapter
