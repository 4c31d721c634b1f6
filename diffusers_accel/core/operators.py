"""Custom operators of torch's dispatcher: opaque nodes in compiled graphs, cheap to call in eager.

`torch.library.custom_op` costs nearly twice as much per call: it checks for mutation and aliasing, and passes through
the dispatcher twice. Where the host bounds the speed, this costs time. Operators made here neither mutate nor return
their arguments; tests check this with `torch.library.opcheck`.

The operators are for inference. A result may be computed while gradients are recorded; a backward pass through it
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..compat.torch_private import AutoDispatchBelowAutograd, dispatch_mode_count

_LIBRARY = torch.library.Library("diffusers_accel", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes a function the operator `torch.ops.diffusers_accel.<name>`, and returns its overload.

    Args:
        name: Name of the operator.
        fake: Function of the same arguments that returns empty tensors with the result's shapes and dtypes.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffusers_accel::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.diffusers_accel, name).default

        def with_gradients(*args: Any) -> Any:
            """The operator's autograd kernel. As a rule the kernel calls `function` directly, which saves a second pass
            through the dispatcher."""
            plain, recorded = True, False
            for item in _tensors(args):
                plain = plain and type(item) in _PLAIN
                recorded = recorded or item.requires_grad
            if recorded and torch.is_grad_enabled():
                return _Forward.apply(overload, args, *_tensors(args))
            with AutoDispatchBelowAutograd():
                # A tracing mode, or a tensor subclass, must see the operator.
                return (function if plain and not dispatch_mode_count() else overload)(*args)

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
    """An operator under autograd: its result requires gradients, and its backward raises."""

    @staticmethod
    def forward(ctx: Any, overload: Any, args: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
        ctx.name = str(overload)
        with AutoDispatchBelowAutograd():
            return overload(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is for inference: it has no backward. Instead: restore(pipe) before training, or "
            "torch.no_grad()."
        )
