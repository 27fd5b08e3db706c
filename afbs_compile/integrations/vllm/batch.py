"""A step of the engine: which of its requests are long, and the batch without some of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEWEST_ROWS = 128
"""Requests of fewer new tokens are left to vLLM: copying their keys out of pages takes longer than is saved."""

WHOLE = ("encoder_seq_lens", "dcp_local_seq_lens", "mm_req_doc_ranges", "rswa_prefix_lens")
"""Fields of vLLM's metadata with which a row sees something else than the keys up to its own."""


class Request(NamedTuple):
    """One long request of a step.

    Attributes:
        place: in the batch; first_row: its first row of the queries; rows: new tokens; keys: all of its tokens.
    """

    place: int
    first_row: int
    rows: int
    keys: int


def long_requests(common: Any, least_work: int) -> tuple[Request, ...]:
    """The requests of which some layer may compute attention sparsely.

    Args:
        common: vLLM's ``CommonAttentionMetadata``; what is on a device is not read.
        least_work: rows times keys of the smallest one.
    """
    lengths = common.seq_lens_cpu_upper_bound  # exact for requests that bring more than a few tokens
    if common.max_query_len < FEWEST_ROWS or common.causal is not True or lengths is None:
        return ()
    if any(getattr(common, name, None) is not None for name in WHOLE):
        return ()
    starts = common.query_start_loc_cpu.tolist()
    found = []
    for index, keys in enumerate(lengths[: common.num_reqs].tolist()):
        rows = starts[index + 1] - starts[index]
        if rows >= FEWEST_ROWS and rows * keys >= least_work:
            found.append(Request(index, starts[index], rows, keys))
    return tuple(found)


@dataclass
class Split:
    """What the metadata of a step carries besides vLLM's own.

    Attributes:
        calls: of the model; long: the requests that may be sparse; common: vLLM's metadata before it was built.
        build: makes a backend's metadata of it.
    """

    calls: Any
    long: tuple[Request, ...]
    common: Any
    build: Callable[[Any], Any]
    _rests: dict[frozenset[int], tuple[Any, Tensor] | None] = field(default_factory=dict)

    def without(self, taken: Collection[int]) -> tuple[Any, Tensor] | None:
        """Metadata of the requests that are not in ``taken``, and their rows, int64; ``None`` where none is left."""
        key = frozenset(taken)
        if key not in self._rests:  # layers that take the same requests share it
            made = reduced(self.common, key)
            self._rests[key] = None if made is None else (self.build(made[0]), made[1])
        return self._rests[key]


def reduced(common: Any, taken: Collection[int]) -> tuple[Any, Tensor] | None:
    """vLLM's metadata of the requests that are not in ``taken``, and their rows; ``None`` where none is left."""
    starts = common.query_start_loc_cpu.tolist()
    lengths = [after - before for before, after in itertools.pairwise(starts)]
    kept = [index for index in range(common.num_reqs) if index not in taken and lengths[index] > 0]
    if not kept:
        return None
    places = [row for index in kept for row in range(starts[index], starts[index + 1])]
    device = common.seq_lens.device
    on_cpu = torch.tensor(kept)
    requests, rows = (torch.tensor(x).to(device, non_blocking=True) for x in (kept, places))
    counts = [lengths[index] for index in kept]
    begins = torch.tensor([0, *counts], dtype=common.query_start_loc_cpu.dtype).cumsum(0, dtype=torch.int32)

    def of(name: str, index: Any) -> Any:
        given = getattr(common, name)
        return None if given is None else given[index]

    made = common.replace(
        query_start_loc=begins.to(device, non_blocking=True),
        query_start_loc_cpu=begins,
        seq_lens=common.seq_lens[requests],
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[on_cpu],
        num_reqs=len(kept),
        num_actual_tokens=len(places),
        max_query_len=max(counts),
        max_seq_len=int(common.seq_lens_cpu_upper_bound[on_cpu].max()),
        block_table_tensor=common.block_table_tensor[requests],
        slot_mapping=common.slot_mapping[rows],
        positions=of("positions", rows),
        is_prefilling=of("is_prefilling", on_cpu),
        req_idx=of("req_idx", on_cpu.numpy()),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return made, rows
