"""Find the key and value heads that a graph repeated for grouped-query attention.

Models repeat each key head for the query heads that share it, most often as ``x[:, :, None].expand(...).reshape(...)``.
The block-sparse operator reads shared heads in place, so it is given the tensor before the repetition. The proof is by
shapes: reshapes keep the row-major order of elements, so one ``expand`` between reshapes is fixed by where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from afbs_compile.passes.effects import Writes, function_name, storage_of, value_of
from afbs_compile.passes.sizes import Size, same_sizes

RESHAPES = frozenset({
    "reshape", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "alias",
})  # fmt: skip
"""Functions that keep the row-major order of elements, except where ``view`` takes a dtype."""

COPIES = frozenset({"contiguous", "clone", "to", "detach", "_to_copy"})
"""Functions that keep values, as long as dtype and device stay the same."""

EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})


@dataclass(frozen=True)
class HeadRepeat:
    """``node[..., h, :, :] == source[..., h // repeats, :, :]``.

    Attributes:
        source: the unrepeated tensor.
        reader: the node that reads it; from there on the repetition may be a copy.
        repeats: copies of each head.
    """

    source: fx.Node
    reader: fx.Node
    repeats: int


def head_repeat(node: fx.Node, writes: Writes, *, before: fx.Node) -> HeadRepeat | None:
    """Where the heads of a key or value come from, if each one is repeated next to itself.

    Args:
        node: a key or value ``[..., heads, length, head_dim]``, at least 4-D.
        writes: the writes of the graph: neither the source nor its repetition may change on the way to ``before``.
        before: the attention call.

    Returns:
        The unrepeated tensor, of the same rank, or None where there is no repetition or it is not proven.
    """
    last = _skip(node, COPIES)
    found = _from_repeat_interleave(last) or _from_expand(last)
    if found is None or found.repeats < 2:
        return None
    storages = _storages(node, found)
    if storages is None or writes.into(storages, before=before, after=found.reader):
        return None
    return found


def _storages(node: fx.Node, repeat: HeadRepeat) -> set[int] | None:
    """The memory of every tensor from a repeated node back to its source; None where some is not known."""
    chain = [node]
    while chain[-1] is not repeat.source:
        chain.append(_input(chain[-1]))
    storages = [storage_of(link) for link in chain]
    return None if None in storages else {storage for storage in storages if storage is not None}


def _from_repeat_interleave(node: fx.Node) -> HeadRepeat | None:
    if _name(node) != "repeat_interleave":
        return None
    source, repeats, dim = node.args[0], _argument(node, 1, "repeats"), _argument(node, 2, "dim")
    rank = len(_shape(node) or ())
    if not isinstance(source, fx.Node) or type(repeats) is not int or dim not in (-3, rank - 3):
        return None
    return HeadRepeat(source, node, repeats)


def _from_expand(node: fx.Node) -> HeadRepeat | None:
    """Reshapes, one ``expand`` of one dimension, reshapes.

    In row-major order ``expand`` makes ``A x 1 x C`` into ``A x g x C``. Read as ``[..., heads, length, head_dim]``, it
    repeats each head g times next to itself if ``A = [..., heads / g]``; C is then as large as ``[length, head_dim]``.
    """
    expand = _skip(node, RESHAPES | COPIES)
    final, wide, narrow = _shape(node), _shape(expand), _shape(_input(expand))
    if _name(expand) not in EXPANDS or final is None or wide is None or narrow is None or len(wide) != len(narrow):
        return None
    widened = [dim for dim in range(len(wide)) if not same_sizes(wide[dim : dim + 1], narrow[dim : dim + 1])]
    if len(widened) != 1:
        return None
    repeats, outer = wide[widened[0]], tuple(wide[: widened[0]])
    if not isinstance(repeats, int) or repeats < 2 or not isinstance(final[-3], int) or final[-3] % repeats:
        return None
    heads = final[-3] // repeats
    unrepeated = (*final[:-3], heads, *final[-2:])
    # One key head for all: A may lack the head dimension.
    if not (same_sizes(outer, unrepeated[:-2]) or (heads == 1 and same_sizes(outer, final[:-3]))):
        return None
    reader = _reader_of_shape(expand, unrepeated)
    return HeadRepeat(_input(reader), reader, repeats) if reader is not None else None


def _reader_of_shape(expand: fx.Node, shape: tuple[Size, ...]) -> fx.Node | None:
    """The nearest node, from ``expand`` up a chain of reshapes, whose input has that shape."""
    reader = expand
    while not same_sizes(_shape(_input(reader)) or (), shape):
        reader = _input(reader)
        if _name(reader) not in RESHAPES or not _keeps_values(reader):
            return None
    return reader


def _skip(node: fx.Node, names: frozenset[str]) -> fx.Node:
    """Up the chain past functions of these names that keep every value."""
    while _name(node) in names and _keeps_values(node):
        node = _input(node)
    return node


def _keeps_values(node: fx.Node) -> bool:
    """Whether a reshape or copy has the input's dtype, device and number of elements, and so the same elements."""
    after, before = value_of(node), value_of(_input(node))
    if not isinstance(after, Tensor) or not isinstance(before, Tensor):
        return False
    return after.dtype == before.dtype and after.device == before.device


def _name(node: fx.Node) -> str:
    """Short name of what a node does; inserting a dimension by indexing counts as ``unsqueeze``.

    A slice that takes everything is an ``alias``: torch.export writes one for each colon of ``x[:, :, None]``.
    """
    name = function_name(node)
    if name == "slice" and same_sizes(_shape(node) or (), _shape(_input(node)) or ()):
        return "alias"
    return "unsqueeze" if name == "getitem" and _inserts_dimensions(node) else name


def _inserts_dimensions(node: fx.Node) -> bool:
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _input(node: fx.Node) -> fx.Node:
    """First argument of a node; the node itself where it has none."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else node


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _shape(node: fx.Node) -> tuple[Size, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None
