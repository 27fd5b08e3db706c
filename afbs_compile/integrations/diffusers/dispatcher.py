"""diffusers' attention dispatcher, and the place in it that is ours.

The dispatcher's list of backends is closed, and it reads ``DIFFUSERS_ATTN_BACKEND`` while it is imported: where that
says "afbs", whoever imports diffusers' models first decides whether they can be imported at all. So this module lets
the dispatcher be imported with its own default, and :func:`add_backend` then says what the variable said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from diffusers.utils import constants
from torch import Tensor

NAME = "afbs"
MEMBER = "AFBS"

_asked_for_us = constants.DIFFUSERS_ATTN_BACKEND == NAME
if _asked_for_us and "diffusers.models.attention_dispatch" not in sys.modules:
    constants.DIFFUSERS_ATTN_BACKEND = "native"

from diffusers.models import attention_dispatch  # noqa: E402

native: Callable[..., Tensor] = attention_dispatch._native_attention
"""What diffusers computes where nobody asks for anything else: PyTorch's own attention, ``[B, N, H, D]``."""


def add_backend(attention: Callable[..., Tensor]) -> None:
    """Make ``"afbs"`` a backend of the dispatcher; a second time does nothing.

    Args:
        attention: takes what the dispatcher hands over, by the names of :data:`native`'s parameters.
    """
    names: Any = attention_dispatch.AttentionBackendName
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_ = MEMBER, NAME
    type.__setattr__(names, MEMBER, member)  # the class itself refuses new members
    names._member_names_.append(MEMBER)
    names._member_map_[MEMBER] = names._value2member_map_[NAME] = member
    registry: Any = attention_dispatch._AttentionBackendRegistry
    registry.register(member, constraints=registry._constraints[names.NATIVE])(attention)
    if _asked_for_us:
        registry.set_active_backend(member)


def active_backend() -> Any:
    """The backend of calls whose model names none."""
    return attention_dispatch._AttentionBackendRegistry._active_backend


def set_active_backend(backend: Any) -> None:
    """Change it."""
    attention_dispatch._AttentionBackendRegistry.set_active_backend(backend)
