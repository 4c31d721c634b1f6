"""A linear layer that stores low-bit weights: the module in a stock layer's place.

To everything around it, it still is the `nn.Linear` it replaces. What is stored are buffers, so optimizers and dtype
changes pass them by and `.to(device)`, offloading and hooks carry them along; `state_dict` speaks of the stock weight;
and `weight` is a tensor of the stock shape and dtype whose values are made when somebody asks for them. Whatever is
written to it (a LoRA being merged, say) is rounded into the stored form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

# What does not depend on the values, and may be answered without them.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_meta", "is_sparse")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.stride}


class RoundedOnce:
    """Rounded activations that several layers can share: Q, K and V read one tensor, so it is rounded for the first of
    them only. Kept as long as the tensor itself, and only while nobody writes to it."""

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[torch.Tensor], int, str, Any] | None = None

    def of(self, x: torch.Tensor, form: str, make: Callable[[torch.Tensor], Any]) -> Any:
        """`make(x)`, or what it gave for the same tensor and form before."""
        if x.is_inference():  # such tensors do not count their changes
            return make(x)
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1:3] == (x._version, form):
            return entry[3]
        self._entry = None
        found = make(x)
        self._entry = (weakref.ref(x, self._drop), x._version, form, found)
        return found

    def _drop(self, reference: Any) -> None:
        if self._entry is not None and self._entry[0] is reference:
            self._entry = None

    def __deepcopy__(self, memory: Any) -> RoundedOnce:
        return RoundedOnce()


class QuantizedLinear(nn.Linear):
    """Base of the layers that store their weight in a low-bit format.

    A subclass says how a weight is stored (`encode`), what the stored form stands for (`dense`), and multiplies
    (`product`).

    Args:
        linear: The stock layer. Its bias is taken over as it is, and its weight encoded on the device where it lies.
    """

    kind: ClassVar[str]
    weight_data: torch.Tensor
    weight_scale: torch.Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    # Multiplies the input, feature by feature, where a checkpoint has smoothed its activations.
    pre_quant_scale: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        self._begin(linear)
        with torch.no_grad():
            for name, tensor in self.encode(linear.weight.detach()).items():
                self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def holding(cls, linear: nn.Linear, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        """A layer for the place of a stock one whose weight is not loaded, with the stored form given."""
        layer = cls.__new__(cls)
        layer._begin(linear)
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor, persistent=False)
        return layer

    def _begin(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self.weight_dtype = linear.weight.dtype
        # Kept apart from the children: its weight is not this model's any more.
        self._stock: tuple[nn.Linear, ...] = ()
        self.rounded_once = RoundedOnce()
        self.register_buffer("pre_quant_scale", None, persistent=False)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored form of a weight, (out_features, in_features): names and tensors."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        """What is stored, as numbers: float32 (out_features, in_features)."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) times the weight, plus the bias, on a CUDA device: (rows, out_features)."""
        raise NotImplementedError

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same in plain torch, summed in float32: what runs where there is no such device. `x` is (rows,
        in_features)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        out = self.product(x) if x.is_cuda else self.reference(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    # --- the weight, as others see it ---

    def keep(self, linear: nn.Linear) -> None:
        """Keeps the stock layer, whose weight may lie on another device, as what `weight` and `state_dict` show."""
        self._stock = (linear,)

    @property
    def stock(self) -> nn.Linear | None:
        """The stock layer, if it is kept."""
        return self._stock[0] if self._stock else None

    @property
    def stored_bytes(self) -> int:
        return sum(item.numel() * item.element_size() for item in self.buffers(recurse=False))

    @property
    def device(self) -> torch.device:
        return next(self.buffers(recurse=False)).device

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a Parameter too: nn.Module would register it beside the stored form
            self.store(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        """The weight in its stock dtype: the stock layer's own where it is kept, what is stored otherwise."""
        if self._stock:
            return self._stock[0].weight.detach().to(self.device, self.weight_dtype)
        dense = self.dense()
        return (dense if self.pre_quant_scale is None else dense * self.pre_quant_scale).to(self.weight_dtype)

    @torch.no_grad()
    def store(self, value: torch.Tensor) -> None:
        """Takes other numbers as the weight.

        Raises:
            ValueError: The shape is another.
        """
        if isinstance(value, WeightView) and value.layer is self:
            return
        if value.shape != (self.out_features, self.in_features):
            raise ValueError(f"A weight of shape {(self.out_features, self.in_features)}, not {tuple(value.shape)}.")
        value = value.detach()
        if self._stock:
            kept = self._stock[0].weight
            kept.copy_(value.to(kept.device, kept.dtype))
        self.pre_quant_scale = None
        for name, tensor in self.encode(value.to(self.device, self.weight_dtype)).items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Stored forms follow the device, never a change of dtype, which would be taken for one of their numbers.
        stored = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(stored)
        for name, tensor in stored.items():
            if tensor is not None:
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.device)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # All layers at once may not fit on the device.
        destination[prefix + "weight"] = self._stock[0].weight.detach() if self._stock else self.numbers().cpu()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        given = state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if given is None:
            if strict:
                missing_keys.append(prefix + "weight")
            return
        state_dict[prefix + "weight"] = given
        try:
            self.store(given)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


_DATA: Any = torch.Tensor.data


class WeightView(torch.Tensor):
    """The weight of a quantized layer as a tensor: shape, dtype and device cost nothing, values are made when they are
    needed, and what is written in place is stored.

    Attributes:
        layer: The layer.
    """

    layer: QuantizedLinear

    @staticmethod
    def __new__(cls, layer: QuantizedLinear) -> WeightView:
        found = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.weight_dtype, device=layer.device
        )
        found.layer = layer
        return found

    def __init__(self, layer: QuantizedLinear):
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightView({self.layer.extra_repr()})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        view: Any = args[0] if args else None
        if func == _DATA.__get__ or func in (torch.Tensor.detach, torch.Tensor.requires_grad_):
            return view
        if func == _DATA.__set__:
            view.layer.store(args[1])
            return None
        if isinstance(kwargs.get("out"), WeightView):
            raise TypeError("The weight of a quantized layer cannot be an `out=`: assign the result to it.")
        name = getattr(func, "__name__", "")
        if (isinstance(view, WeightView) and name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
            numbers = view.layer.numbers().clone()
            func(numbers, *(_plain(item) for item in args[1:]), **{key: _plain(item) for key, item in kwargs.items()})
            view.layer.store(numbers)
            return view
        return func(*(_plain(item) for item in args), **{key: _plain(item) for key, item in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        return func(*(_plain(item) for item in args), **{key: _plain(item) for key, item in (kwargs or {}).items()})


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")} | {"__setitem__"}


def _plain(x: Any) -> Any:
    if isinstance(x, WeightView):
        return x.layer.numbers()
    if isinstance(x, (list, tuple)) and any(isinstance(item, WeightView) for item in x):
        return type(x)(_plain(item) for item in x)
    return x
