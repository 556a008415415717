"""Who imports whom: arrows point down, and tests stand alone."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "optax_sam"
# What the modules of a folder may import of the package. Every other paper scales by
# the link of SAM.
MAY_IMPORT = {
    "_base": {"_base"},
    "_engine": {"_base", "_engine"},
    "_masks": {"_base", "_masks"},
    "_ascents": {"_base", "_engine", "_masks", "_ascents.sam"},
    "_descents": {"_base", "_engine", "_ascents.sam"},
    "diagnostics": {"_base", "_engine", "_masks", "diagnostics"},
    "flax": {"_base", "_engine"},
    "implicit": {"_base"},
}
DEPENDENCIES = {"chex", "jax", "numpy", "optax"}
NEED_FLAX = {"flax", "implicit"}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """The modules that a file imports, wherever in it; `from` a package, its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def is_within(module, allowed):
    return any(f"{module}.".startswith(f"optax_sam.{name}.") for name in allowed)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_what_lies_below_them(module):
    folder = module.partition(".")[2].partition(".")[0]
    for imported in set(imports(MODULES[module])):
        top = imported.partition(".")[0]
        if top == "optax_sam":
            if folder:  # The package itself brings all together.
                assert is_within(imported, MAY_IMPORT[folder]), imported
        elif top not in sys.stdlib_module_names:
            allowed = DEPENDENCIES | ({"flax"} if folder in NEED_FLAX else set())
            assert top in allowed, imported


def test_no_imports_in_circles():
    own = {name: set(imports(path)) & set(MODULES) for name, path in MODULES.items()}
    graphlib.TopologicalSorter(own).prepare()


def test_no_test_imports_another():
    for path in TESTS.rglob("*.py"):
        for imported in imports(path):
            assert not imported.rpartition(".")[2].startswith("test_"), path
