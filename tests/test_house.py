"""The house keeps its shape: rooms import only leftwards, packages are complete, nothing shadows a library."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "parallel", "models", "platform", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module a file imports, inside functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module.count(".") < 2 else [module]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_only_leftwards(path: Path) -> None:
    own = ROOMS.index(path.relative_to(ROOT).parts[0])
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "farspan":
            assert len(parts) > 1 and parts[1] in ROOMS, f"{path}: imports {name}"
            assert ROOMS.index(parts[1]) <= own, f"{path}: {ROOMS[own]} may not import from {parts[1]}"


def test_no_circles() -> None:
    graph = {}
    for path in FILES:
        dotted = "farspan." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[dotted] = imports(path)
    known = {
        m: {name if name in graph else name.rpartition(".")[0] for name in names} & set(graph)
        for m, names in graph.items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, "a circle: " + " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in known[module] - {module}:
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_rooms_have_no_init_and_every_package_is_listed() -> None:
    for room in ("", *ROOMS, "configs"):
        assert not (ROOT / room / "__init__.py").exists(), (
            f"{room}/__init__.py would make platform/ shadow the library's"
        )
    folders = {path.parent for path in FILES} | {ROOT / "configs"}
    wanted = {"farspan." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert wanted == set(PROJECT["tool"]["setuptools"]["packages"])


def test_links_for_type_checkers_and_ray() -> None:
    for room in (*ROOMS, "configs"):
        link = ROOT / ".ci" / "farspan" / room
        assert link.is_symlink() and str(link.readlink()) == f"../../{room}"


def test_no_module_is_named_like_a_library() -> None:
    libraries = {name.lower() for name in importlib.metadata.packages_distributions()} - {
        "farspan",
        *ROOMS,
        "configs",
        "tests",
    }
    for path in FILES:
        assert path.stem == "__init__" or path.stem not in libraries, f"{path} is named like an installed library"


def test_files_stay_readable() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path}: over 500 lines; split it by noun"
        assert ast.get_docstring(ast.parse(text)), f"{path}: opens with one sentence that is worth reading"


def test_the_librarys_platform_survives_in_the_root() -> None:
    code = "import platform; print(platform.system())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == os.uname().sysname


def test_every_config_says_what_it_proves() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# Proves") and first.endswith("."), f"{path}: line 1 says what it proves"
