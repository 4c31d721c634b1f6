"""Operators of ours, as torch's dispatcher knows them: opaque in compiled graphs, cheap to call.

`torch.library.custom_op` does the same with more around every call (its checks for mutation and aliasing, two passes
through the dispatcher), at nearly twice the cost, which shows on a GPU that is faster than the host. Ours neither
mutate what they are given nor return it, and tests check that (`torch.library.opcheck`). They are for inference: a
result may be computed while gradients are recorded, and going back through it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

_LIBRARY = torch.library.Library("diffusers_accel", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function an operator, `torch.ops.diffusers_accel.<name>`. To be used as a decorator; what stands in the
    function's place is the operator, called with the same arguments.

    Args:
        name: The operator's.
        fake: Of the same arguments, returns empty tensors of the result's shapes and types.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffusers_accel::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.diffusers_accel, name).default

        def with_gradients(*args: Any) -> Any:
            """What runs where torch would record gradients: usually the function itself, without a second pass through
            the dispatcher."""
            plain, recorded = True, False
            for item in _tensors(args):
                plain = plain and type(item) in _PLAIN
                recorded = recorded or item.requires_grad
            if recorded and torch.is_grad_enabled():
                return _Forward.apply(overload, args, *_tensors(args))
            with torch._C._AutoDispatchBelowAutograd():
                # A mode that traces, or a tensor of another class, has its own say.
                return (function if plain and not torch._C._len_torch_dispatch_stack() else overload)(*args)

        _LIBRARY.impl(name, with_gradients, "Autograd")
        return overload

    return register


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for item in args:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from (each for each in item if isinstance(each, torch.Tensor))


class _Forward(torch.autograd.Function):
    """An operator's result as one that depends on what it was given, and refuses to say how."""

    @staticmethod
    def forward(ctx: Any, overload: Any, args: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
        ctx.name = str(overload)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is for inference: no gradient goes back through it. Instead: restore(pipe) before training, "
            "or torch.no_grad()."
        )
