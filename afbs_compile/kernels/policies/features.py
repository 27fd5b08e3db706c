"""What the policies by groups are made of: features whose products are the logits of a coarser attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from afbs_compile.kernels.operands import Operands

GROUP = 16
"""Query tokens of a group; every block is a multiple of it."""


class Features(NamedTuple):
    """What the logits are made of.

    The logit of query group a and key group b is ``scale * sum_t <q[a * parts + t'], k[b * parts + t]>`` over the
    ``parts`` rows of each, with ``t' = parts - 1 - t`` where ``reverse``, else t. Rows past the end are zeros.

    Attributes:
        q: ``[B, H, rows, D]``; k: ``[B, H_kv, rows', D]``, same dtype, any strides.
        parts: feature rows of a group.
        reverse: whether the rows of a query group are taken backwards.
        span: key tokens of a key group.
        last: the last token of a query group, which decides what the group sees: key group b is seen by query group a
            when the mask shows the token at ``a * GROUP + last`` the first key of b.
    """

    q: Tensor
    k: Tensor
    scale: float
    parts: int
    reverse: bool
    span: int
    last: int


def first_rows(operands: Operands) -> Features:
    """The first row of every query group, against every key."""
    return Features(operands.q[:, :, ::GROUP], operands.k, operands.scale, parts=1, reverse=False, span=1, last=0)
