"""The whole package imports in one direction, and docs/architecture.md says which."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "afbs_compile"
DOCUMENT = ROOT / "docs" / "architecture.md"
MARK = "<!-- modules -->"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in MODULES}


def listed() -> list[str]:
    """The modules of the document's list, in its order."""
    text = DOCUMENT.read_text(encoding="utf-8").partition(MARK)[2]
    items = re.findall(r"^- (.*?): ", text.replace("\n  ", " "), re.MULTILINE)
    names = [name for item in items for name in re.findall(r"`([\w.]+)`", item)]
    return [name if name == "afbs_compile" else f"afbs_compile.{name}" for name in names]


def test_the_document_names_every_module_once() -> None:
    assert sorted(listed()) == sorted(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    order = listed()
    above = set(order[: order.index(module)])
    assert imported(MODULES[module]) - {module} <= above


def test_no_relative_import_escapes_the_order() -> None:
    relative = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


PLACE = re.compile(r"^.*?  +((?:passes|tuner|kernels|export)/[\w/, ]+|found|recipe|plan|backend, cache)$", re.MULTILINE)


def test_each_arrow_of_the_pipeline_names_modules_that_exist() -> None:
    found = PLACE.findall(DOCUMENT.read_text(encoding="utf-8"))
    places = [place.strip().replace("/", ".") for places in found for place in places.split(",")]
    assert len(places) >= 12
    assert {f"afbs_compile.{place}" for place in places} <= set(MODULES)


FORBIDDEN = re.compile(r"\.device\.type|\bdevice\.type\b|\.is_cuda\b")


@pytest.mark.parametrize("module", sorted(name for name in MODULES if ".kernels.attend." not in name))
def test_only_engines_ask_for_the_kind_of_a_device(module: str) -> None:
    assert not FORBIDDEN.search(MODULES[module].read_text(encoding="utf-8"))
