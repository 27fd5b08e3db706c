"""What the package looks like from afar: files that name a word, long signatures, import cycles, lines.

    python benchmarks/structure.py [ROOT]

ROOT is a checkout, this one by default, so that two states compare: ``git worktree add /tmp/before COMMIT``. Imports
inside functions count as any other. Methods do not count ``self``; Triton kernels and the operator's schema, which
have to be flat, are left out of the signatures.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from scipy.sparse import lil_matrix
from scipy.sparse.csgraph import connected_components

MOST_PARAMETERS = 8
WORDS = ("causal", "block_q")
FLAT = ("jit", "custom_op")


def long_signatures(tree: ast.Module) -> list[tuple[str, int]]:
    """Functions with more than :data:`MOST_PARAMETERS` parameters, and how many they have."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(word in ast.unparse(decorator) for decorator in node.decorator_list for word in FLAT):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MOST_PARAMETERS:
            found.append((node.name, count))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Modules that are imported anywhere, and names imported from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def cycles(trees: dict[str, ast.Module]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    modules = list(trees)
    graph = lil_matrix((len(modules), len(modules)), dtype=bool)
    for row, module in enumerate(modules):
        for name in (imports(trees[module]) & trees.keys()) - {module}:
            graph[row, modules.index(name)] = True
    _, labels = connected_components(graph.tocsr(), directed=True, connection="strong")
    groups = [[m for m, its in zip(modules, labels, strict=True) if its == label] for label in set(labels)]
    return [group for group in groups if len(group) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parent.parent)
    package = parser.parse_args().root / "afbs_compile"
    texts = {file.relative_to(package): file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}
    lengths = {str(file): len(text.splitlines()) for file, text in texts.items()}
    longest = max(lengths, key=lambda file: lengths[file])
    print(f"files: {len(texts)}, lines: {sum(lengths.values())}, longest: {longest} ({lengths[longest]})")
    for word in WORDS:
        naming = re.compile(rf"\b{word}\b")
        print(f"files that name {word}: {sum(naming.search(text) is not None for text in texts.values())}")
    trees = {
        ".".join((package.name, *file.with_suffix("").parts)).removesuffix(".__init__"): ast.parse(text)
        for file, text in texts.items()
    }
    signatures = [(module, *found) for module, tree in trees.items() for found in long_signatures(tree)]
    print(f"functions of more than {MOST_PARAMETERS} parameters: {len(signatures)}")
    for module, name, count in signatures:
        print(f"  {module}.{name}: {count}")
    found = cycles(trees)
    print(f"import cycles: {len(found)}")
    for group in found:
        print(f"  {', '.join(group)}")


if __name__ == "__main__":
    main()
