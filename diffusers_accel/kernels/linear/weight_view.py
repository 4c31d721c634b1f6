"""The weight of a linear proxy as a lazy tensor: `WeightView`.

Stock code, PEFT and `load_state_dict` read and write `linear.weight`. A proxy keeps its weight in another form, so its
`weight` is a tensor without memory: a read dequantizes the stored form, a write is quantized into it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from ...compat.torch_private import pytree
from ...core.lazy_tensor import LazyTensor

_DATA: Any = torch.Tensor.data


class WeightOwner(Protocol):
    """A layer that stores its weight in another form: `module.LinearProxy`."""

    kind: ClassVar[str]
    out_features: int
    in_features: int
    weight_dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def materialize(self) -> torch.Tensor: ...

    def set_weight(self, weight: torch.Tensor) -> None: ...

    def extra_repr(self) -> str: ...


class WeightView(LazyTensor):
    """The weight of a proxy, (out_features, in_features), in `layer.weight_dtype` on `layer.device`.

    A write to the view reaches the layer. A write to a slice of the view, such as `weight[0]`, does not.

    Attributes:
        layer: The layer, which owns the values. The view holds none of its own, so it is never stale.
    """

    layer: WeightOwner

    @staticmethod
    def __new__(cls, layer: WeightOwner) -> WeightView:
        view = cls.without_values((layer.out_features, layer.in_features), layer.weight_dtype, layer.device)
        view.layer = layer
        return view

    def compute(self) -> torch.Tensor:
        return self.layer.materialize()

    def hold(self, values: torch.Tensor) -> None:
        """Nothing is held: the layer may change between two uses."""

    def writable(self) -> torch.Tensor:
        return self.layer.materialize().clone()

    def written(self, values: torch.Tensor) -> None:
        self.layer.set_weight(values)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightView({self.layer.extra_repr()})"

    @classmethod
    def handle(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps `.data`, `detach()` and gradient flags lazy, and refuses an `out=`."""
        if func == _DATA.__get__ or func in (torch.Tensor.detach, torch.Tensor.requires_grad_):
            return args[0]
        if getattr(func, "__name__", "") == "__set__":
            if func == _DATA.__set__:
                args[0].layer.set_weight(args[1])
            return None  # the layer has no gradient that a setter could change
        outs = pytree.tree_leaves(kwargs["out"]) if kwargs.get("out") is not None else ()
        for out in outs:
            if isinstance(out, WeightView):
                raise TypeError(
                    f"The weight of a {out.layer.kind} layer cannot be an `out=`: it has no memory of the stock dtype. "
                    "Assign the result to it instead."
                )
        return NotImplemented
