"""``generate()`` of what ``torch.compile`` returned.

PyTorch hands every method but the call to the module itself: ``torch.compile(model).generate(...)`` would run the model
uncompiled, without a word. For models compiled with this backend the module's ``forward`` is the compiled one while
``generate`` runs, but for decode steps: they have nothing to skip, and each new length could compile again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._dynamo import eval_frame

from afbs_compile.passes.rules import FEWEST_ROWS

Backend = Callable[..., Any]

_forwards: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
"""The compiled ``forward`` of each wrapper."""


def take_part_in_generation(backend: Backend) -> None:
    """Have ``generate`` of modules compiled with a backend run what was compiled.

    Args:
        backend: the function that ``torch.compile`` finds under the backend's name.
    """
    wrapper = eval_frame.OptimizedModule
    original = wrapper.__getattr__

    @functools.wraps(original)
    def getattribute(self: Any, name: str) -> Any:
        value = original(self, name)
        return _compiled(self, value) if name == "generate" and _is_ours(self, backend) else value

    wrapper.__getattr__ = getattribute  # type: ignore[method-assign]


def _is_ours(wrapper: Any, backend: Backend) -> bool:
    try:
        innermost = eval_frame.innermost_backend(wrapper.dynamo_ctx.callback)
    except AttributeError:  # a PyTorch that keeps it elsewhere
        return False
    return getattr(innermost, "compiler_fn", innermost) is backend


def _compiled(wrapper: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _compiled_forward(wrapper):
            return generate(*args, **kwargs)

    return run


@contextmanager
def _compiled_forward(wrapper: Any) -> Iterator[None]:
    module = wrapper._orig_mod
    if "forward" in vars(module):  # a wrapper's call within a call, or a forward of the user's own
        yield
        return
    plain = module.forward
    compiled = _forwards.get(wrapper)
    if compiled is None:
        compiled = _forwards[wrapper] = wrapper.dynamo_ctx(_function_of(module))

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _is_decode(args, kwargs):
            return plain(*args, **kwargs)
        return compiled(module, *args, **_without_needless_mask(kwargs))

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _function_of(module: nn.Module) -> Callable[..., Any]:
    """The class's ``forward``: a bound one would keep the module alive."""
    return type(module).forward


def _without_needless_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without a mask of ones, which generation gives where nobody does: compiled code cannot look at it,
    and would make a mask of every row and key of it.
    """
    mask = kwargs.get("attention_mask")
    needless = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask != 0).all())
    return {**kwargs, "attention_mask": None} if needless else kwargs


def _is_decode(args: Any, kwargs: dict[str, Any]) -> bool:
    tokens = next((x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    return isinstance(tokens, Tensor) and tokens.dim() >= 2 and tokens.shape[1] < FEWEST_ROWS
