"""The list of passes is the truth: every name is a function, and none imports a later one."""

import ast
import importlib
from pathlib import Path

import pytest

from afbs_compile import passes


@pytest.mark.parametrize("name", passes.ORDER)
def test_every_pass_is_a_function_in_a_file_of_its_name(name):
    module = importlib.import_module(f"afbs_compile.passes.{name}")
    assert callable(getattr(module, name))
    assert getattr(module, name).__doc__


@pytest.mark.parametrize("name", passes.ORDER)
def test_no_pass_imports_a_later_one(name):
    later = {f"afbs_compile.passes.{other}" for other in passes.ORDER[passes.ORDER.index(name) + 1 :]}
    assert not imported_by(f"afbs_compile.passes.{name}", set()) & later


def imported_by(name, seen):
    """Modules of the package's passes that a module imports, itself or through others."""
    source = Path(importlib.import_module(name).__file__).read_text()
    direct = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module}
    for module in direct - seen:
        if module.startswith("afbs_compile.passes."):
            seen.add(module)
            imported_by(module, seen)
    return seen
