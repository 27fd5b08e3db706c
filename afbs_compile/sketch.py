"""Sketches of tensors: whether weights are those that a recipe was made with, in whatever form they are loaded.

A sketch holds a checksum of all bits and a few of the values. The checksum tells that nothing changed; the values
survive what a checksum does not: another dtype, quantisation, a tensor that is somewhere else for now. Of a tensor in
shards both are of the whole, so that one process and several know the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from afbs_compile.codec import Range
from afbs_compile.fingerprint import described
from afbs_compile.peers import is_sharded

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
        shape: of the whole tensor, as all that follows, whatever part this process holds; dtype: e.g. ``"bfloat16"``.
        digest: :func:`afbs_compile.fingerprint.described`; empty where the values are elsewhere.
        values: at :data:`PLACES` places spread evenly, 6 digits; ``None`` at those that cannot be read.
    """

    name: str
    shape: tuple[Annotated[int, Range(0)], ...]
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


def unread(sketch: TensorSketch) -> TensorSketch:
    """What is left of a sketch once the values have changed."""
    return replace(sketch, digest="", values=(None,) * len(sketch.values))


def version_of(tensor: Tensor) -> int:
    """A number that grows when the tensor is written into; -1 where PyTorch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _sketch(name: str, tensor: Tensor) -> TensorSketch:
    version = version_of(tensor)
    known = _known.get(tensor)
    if known is None or known[0] != version or version < 0:
        whole = _whole(tensor)
        known = (version, "" if whole.is_meta else described(whole), _values(whole))
        _known[tensor] = known
    return TensorSketch(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), known[1], known[2])


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    """The tensor; of a shard all of it, for as long as it is read. The processes that share it all come here."""
    if not is_sharded(tensor) or tensor.to_local().is_meta:
        return tensor  # type: ignore[no-any-return]
    device = tensor.device_mesh.device_type  # shards may be kept on the host, whose group sends nothing
    return tensor.to(device).full_tensor()  # type: ignore[no-any-return]


@torch.no_grad()
def held(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """What this process itself holds of each tensor, in few characters: the other ones are not asked."""
    return [_held(tensor) for _, tensor in tensors]


def _held(tensor: Any) -> str:
    return described(tensor.to_local()) if is_sharded(tensor) else _sketch("", tensor).digest


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
    """Of a quantised tensor what it stands for."""
    try:
        return _rounded(_at(tensor.dequantize(), places))
    except (AttributeError, NotImplementedError, RuntimeError):  # it has no such form
        return (None,) * len(places)


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
