"""A mend of inductor's C++ template of FlexAttention, while our function is compiled.

The template lets two symbols stand for the sizes of a tile, and puts the variables that hold these in their place by
replacing text: where a symbol's name begins another one's (``ks1`` and ``ks12``, as soon as a mask reads a tensor of
symbolic strides) it replaces half of that, and the C++ does not compile. Here the two have names that begin no other's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def tile_symbols_apart() -> Iterator[None]:
    """Compile FlexAttention for the CPU with names of their own for the sizes of a tile."""
    importlib.import_module("torch._inductor.lowering")  # the template cannot be imported first
    from torch._inductor.codegen.cpp_flex_attention_template import CppFlexAttentionTemplate

    original = CppFlexAttentionTemplate.modification

    @functools.wraps(original)
    def modification(self: Any, *args: Any, **named: Any) -> Any:
        # What is listed here is named after the symbol itself.
        with patch.object(self, "extra_sizevars", [*self.extra_sizevars, *self.block_vars]):
            return original(self, *args, **named)

    with patch.object(CppFlexAttentionTemplate, "modification", modification):
        yield
