"""Mark the attention calls of a graph that are not spelled as ``scaled_dot_product_attention``."""

from __future__ import annotations

from torch import fx

from afbs_compile.passes.varlen import mark_varlen
from afbs_compile.passes.written_call import mark_written


def mark_calls(gm: fx.GraphModule) -> None:
    """Mark ``varlen_attn`` and attention that is written out, so that ``find`` sees them; in place."""
    mark_varlen(gm)
    mark_written(gm)
