"""Sketches of tensors: whether weights are those that a recipe was made with, in whatever form they are loaded.

A sketch holds a checksum of all bits and a few of the values. The checksum tells that nothing changed; the values
survive what a checksum does not: another dtype, quantisation, shards of which a process holds one, a tensor that is
somewhere else for now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from afbs_compile.fingerprint import described

PLACES = 8
"""Values of a tensor in its sketch."""

ALIKE = 0.3
"""Relative distance of the values up to which weights count as another form of the same ones: quantised to a few bits
or trained a little further they stay far below it, those of another model are near 1."""

ROUNDING = 2**-7
"""Relative distance that a change of dtype alone makes, with a factor of two to spare."""


@dataclass(frozen=True)
class TensorSketch:
    """One parameter or buffer.

    Attributes:
        name: path in the model, as far as it is known.
        shape: of the whole tensor, whatever part of it this process holds; dtype: e.g. ``"bfloat16"``.
        digest: :func:`afbs_compile.fingerprint.described`, of what this process holds; empty where it holds nothing.
        values: at :data:`PLACES` places spread evenly, 6 digits; ``None`` at those that this process does not hold.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Likeness:
    """How the tensors of a model compare with those that a recipe was made with.

    Attributes:
        same: whether each has a counterpart of the same bits.
        distance: median of the tensors' relative distances from their counterparts, among those whose bits differ;
            0 where there is none. typical: the same among all, but for constant tensors, which models share, as long
            as there are others.
        dtypes: (there, here) of floating tensors whose dtype differs.
        unread: tensors of which no value is at hand; more: tensors without any counterpart.
        count: tensors in all.
    """

    same: bool
    distance: float
    typical: float
    dtypes: tuple[tuple[str, str], ...]
    unread: int
    more: int
    count: int

    @property
    def foreign(self) -> bool:
        """Whether the tensors are those of another model."""
        return self.typical > ALIKE or (self.count > 0 and self.more > self.count / 2)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Digest and values by tensor, with the version they are of: a model of many graphs is read once."""


def sketched(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorSketch, ...]:
    """The sketch of each named tensor."""
    return tuple(_sketch(name, tensor) for name, tensor in tensors)


def all_read(sketches: Iterable[TensorSketch]) -> bool:
    """Whether every tensor was at hand: of weights that are elsewhere nothing tells one model from another."""
    return all(sketch.digest for sketch in sketches)


def version_of(tensor: Tensor) -> int:
    """A number that grows when the tensor is written into; -1 where PyTorch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _sketch(name: str, tensor: Tensor) -> TensorSketch:
    version = version_of(tensor)
    known = _known.get(tensor)
    if known is None or known[0] != version or version < 0:
        known = (version, "" if tensor.is_meta else described(tensor), _values(tensor))
        _known[tensor] = known
    return TensorSketch(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), known[1], known[2])


@torch.no_grad()
def _values(tensor: Tensor) -> tuple[float | None, ...]:
    count = math.prod(tensor.shape)
    if count == 0 or tensor.dtype.is_complex:
        return ()
    places = [(2 * i + 1) * count // (2 * PLACES) for i in range(PLACES)] if count > PLACES else list(range(count))
    if tensor.is_meta:
        return (None,) * len(places)
    if is_traceable_wrapper_subclass(tensor):
        return _values_of_subclass(tensor, places)
    return _rounded(_at(tensor, places))


def _values_of_subclass(tensor: Any, places: Sequence[int]) -> tuple[float | None, ...]:
    """Of a shard the places that it holds; of a quantised tensor what it stands for."""
    if hasattr(tensor, "placements"):
        return _values_of_shard(tensor, places)
    try:
        return _rounded(_at(tensor.dequantize(), places))
    except (AttributeError, NotImplementedError, RuntimeError):  # it has no such form
        return (None,) * len(places)


def _values_of_shard(tensor: Any, places: Sequence[int]) -> tuple[float | None, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(local.shape) or any(placement.is_partial() for placement in tensor.placements):
        return (None,) * len(places)
    inside: dict[int, int] = {}
    for index, place in enumerate(places):
        at = [int(x) - start for x, start in zip(_unravelled(place, tensor.shape), offset, strict=True)]
        if all(0 <= x < size for x, size in zip(at, shape, strict=True)):
            inside[index] = sum(x * math.prod(shape[d + 1 :]) for d, x in enumerate(at))
    found = dict(zip(inside, _rounded(_at(local, list(inside.values()))), strict=True)) if inside else {}
    return tuple(found.get(index) for index in range(len(places)))


def _unravelled(place: int, shape: Sequence[int]) -> list[int]:
    at = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        at.append(rest)
    return at[::-1]


def _at(tensor: Tensor, places: Sequence[int]) -> list[float]:
    """Elements by their place in the tensor's own order; no copy of the rest."""
    if tensor.dim() == 0:
        return [float(tensor)]
    columns = list(zip(*(_unravelled(place, tensor.shape) for place in places), strict=True))
    index = tuple(torch.tensor(column, device=tensor.device) for column in columns)
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:  # FP8 has no indexing
        return [float(tensor[tuple(at)]) for at in zip(*columns, strict=True)]
    return [float(value) for value in tensor[index].tolist()]


def _rounded(values: Iterable[float]) -> tuple[float | None, ...]:
    return tuple(float(f"{value:.6g}") if math.isfinite(value) else None for value in values)


def likeness(here: Sequence[TensorSketch], there: Sequence[TensorSketch]) -> Likeness:
    """Compare a model's tensors with those that a recipe was made with.

    Each is compared with the tensor of its shape whose values are nearest: names change with wrappers and versions.

    Args:
        here: of the model; there: of the recipe, which may have more.
    """
    bits = {sketch.digest for sketch in there if sketch.digest}
    by_shape: dict[tuple[int, ...], list[TensorSketch]] = {}
    for sketch in there:
        by_shape.setdefault(sketch.shape, []).append(sketch)
    distances: list[float] = []
    dtypes: dict[tuple[str, str], None] = {}
    unread = more = 0
    others = [sketch for sketch in here if sketch.digest not in bits]
    varied = not all(map(_is_constant, here))
    everywhere = [0.0 for sketch in here if sketch.digest in bits and _is_constant(sketch) != varied]
    for sketch in others:
        candidates = by_shape.get(sketch.shape, [])
        known = [(d, other) for other in candidates if (d := distance(sketch, other)) is not None]
        if known:
            nearest, other = min(known, key=lambda pair: pair[0])
            distances.append(nearest)
            everywhere += [nearest] if _is_constant(sketch) != varied else []
            if other.dtype != sketch.dtype:
                dtypes[other.dtype, sketch.dtype] = None
        elif candidates:
            unread += 1
        else:
            more += 1
    return Likeness(not others, _median(distances), _median(everywhere), tuple(dtypes), unread, more, len(here))


def _is_constant(sketch: TensorSketch) -> bool:
    return len(set(sketch.values)) <= 1


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def distance(one: TensorSketch, other: TensorSketch) -> float | None:
    """Relative distance of two tensors' values; ``None`` where none is known of both."""
    pairs = [(a, b) for a, b in zip(one.values, other.values, strict=False) if a is not None and b is not None]
    if not pairs:
        return None
    size = math.sqrt(sum(b * b for _, b in pairs))
    apart = math.sqrt(sum((a - b) ** 2 for a, b in pairs))
    return apart / size if size else (0.0 if apart == 0 else math.inf)
