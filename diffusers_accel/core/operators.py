"""Operators of ours, as torch's dispatcher knows them: opaque in compiled graphs, cheap to call.

`torch.library.custom_op` does the same with more around every call (copies of its checks for mutation and aliasing,
a layer for autograd): three times the cost, which on a GPU that is faster than the host shows. Ours neither mutate what
they are given nor return it, and tests check that (`torch.library.opcheck`); they are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("diffusers_accel", "FRAGMENT")


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
        return getattr(torch.ops.diffusers_accel, name).default

    return register
