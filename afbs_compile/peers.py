"""Processes that hold one model together: which part of it each has, and how they decide alike.

A model in shards (PyTorch's DTensor) runs in several processes. Where each has some of the heads of a call (tensor
parallel), they calibrate the call together: what is one for all its heads is agreed on, what belongs to a head is
gathered. All of it goes through the process groups of the model's own meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from afbs_compile.errors import first_line

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process failed at what this one does with it."""


@dataclass(frozen=True)
class _Failure:
    reason: str


class Part(NamedTuple):
    """Which part of a call's heads a process has, of how many equal ones."""

    number: int = 0
    of: int = 1


class Peers:
    """The processes of a mesh; without one, this process alone.

    Args:
        mesh: a ``torch.distributed.device_mesh.DeviceMesh``.
    """

    def __init__(self, mesh: Any = None) -> None:
        self._mesh = mesh

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Peers:
        """Those that hold some tensors together: of the largest mesh that any of them is spread over."""
        shards: list[Any] = list(filter(is_sharded, tensors))
        meshes = [shard.device_mesh for shard in shards]
        return cls(max(meshes, key=lambda mesh: int(mesh.size()), default=None))

    @property
    def are_alone(self) -> bool:
        """Whether there is no other process."""
        return self._mesh is None or self._mesh.size() == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does what is to be done once."""
        return self._mesh is None or not any(self._mesh.get_coordinate() or ())

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of the mesh; all of them have to come here.

        Raises:
            PeerError: another one failed in :meth:`together`.
        """
        values: list[Any] = self._exchanged(value)
        for number, other in enumerate(values):
            if isinstance(other, _Failure):
                raise PeerError(f"process {number} of those that share the model failed: {other.reason}")
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them."""
        made: list[Any] = self.gathered(make() if self.is_first else None)
        return made[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let the others know where this process fails at what all do, or they would wait for it for ever."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            self._exchanged(_Failure(first_line(error)))
            raise
        self.gathered(None)

    def _exchanged(self, value: Any) -> list[Any]:
        values = [value]
        if self._mesh is None:
            return values
        for dim in range(self._mesh.ndim):
            size = self._mesh.size(dim)
            if size > 1:
                rows: list[Any] = [None] * size
                dist.all_gather_object(rows, values, group=self._mesh.get_group(dim))
                values = [each for row in rows for each in row]
        return values


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor: this process may hold a part of it."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def part_of(tensors: Iterable[Any], heads: int, width: int) -> Part:
    """The part of a call's heads that this process has, by the weights that make them.

    A projection has one row, or column, for each number of each head: if it is cut there into as many parts as the
    call's heads here are of all, they are cut alike. A weight that is only stored in shards is whole when it computes.

    Args:
        tensors: weights of the module that makes the call, as they are while it does.
        heads: query heads here; width: their size.
    """
    for tensor in filter(is_sharded, tensors):
        numbers, counts = 0, 1
        coordinate = tensor.device_mesh.get_coordinate()
        sharded = [(d, p.dim) for d, p in enumerate(tensor.placements) if getattr(p, "dim", None) is not None]
        for mesh_dim, _ in sharded:
            size = tensor.device_mesh.size(mesh_dim)
            numbers, counts = numbers * size + coordinate[mesh_dim], counts * size
        if counts > 1 and any(tensor.shape[dim] == counts * heads * width for _, dim in sharded):
            return Part(numbers, counts)
    return Part()
