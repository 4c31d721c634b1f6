"""Modules in a stock layer's place, and the one that stores low-bit weights.

To everything around it, a stand-in still is the `nn.Linear` it replaces: `state_dict` speaks of the stock weight, and
`weight` is a tensor of the stock shape and dtype whose values are made when somebody asks for them. Whatever is written
to it (a LoRA being merged, say) is rounded into the stored form. What is stored are buffers, so optimizers and dtype
changes pass them by and `.to(device)`, offloading and hooks carry them along.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

# What does not depend on the values, and may be answered without them.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_meta", "is_sparse")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.stride}


# Where a module that is no `StandIn` remembers the stock layer it stands for; in a tuple, so that it is no child of it.
STOCK = "_diffusers_accel_stock"


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

    def forget(self) -> None:
        """Drops what is kept."""
        self._entry = None

    def _drop(self, reference: Any) -> None:
        if self._entry is not None and self._entry[0] is reference:
            self._entry = None

    def __deepcopy__(self, memory: Any) -> RoundedOnce:
        return RoundedOnce()


class Apart(ValueError):
    """Layers that cannot be joined in one: why, to follow their names."""


def _below(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors one below the other. Bytes are joined: not every operation knows the low-bit types."""
    return torch.cat([item.view(torch.uint8) for item in tensors]).view(tensors[0].dtype)


class StandIn(nn.Linear):
    """Base of the modules in a stock layer's place. A subclass says what its weight is (`numbers`) and takes another
    (`store`).

    Attributes:
        weight_dtype: The weight's type, to everything around.
    """

    kind: ClassVar[str]
    weight_dtype: torch.dtype

    @property
    def stock(self) -> nn.Linear | None:
        """The stock layer, if its weight is kept."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def numbers(self) -> torch.Tensor:
        """The weight in its stock dtype."""
        raise NotImplementedError

    def store(self, value: torch.Tensor) -> None:
        """Takes other numbers as the weight.

        Raises:
            ValueError: The shape is another.
        """
        raise NotImplementedError

    def retype(self, dtype: torch.dtype) -> None:
        """Has the weight be of another type to everything around, before other numbers are taken as it."""

    def _judged(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape != (self.out_features, self.in_features):
            raise ValueError(f"A weight of shape {(self.out_features, self.in_features)}, not {tuple(value.shape)}.")
        return value.detach()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a Parameter too: nn.Module would register it beside the stored form
            self.store(value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # All layers at once may not fit on the device.
        stock = self.stock
        destination[prefix + "weight"] = stock.weight.detach() if stock is not None else self.numbers().cpu()

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
            if local_metadata.get("assign_to_params_buffers", False):
                self.retype(given.dtype)
            self.store(given)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")


class QuantizedLinear(StandIn):
    """Base of the layers that store their weight in a low-bit format.

    A subclass says how a weight is stored (`encode`), what the stored form stands for (`dense`), and multiplies
    (`product`).

    Args:
        linear: The stock layer. Its bias is taken over as it is, and its weight encoded on the device where it lies.
    """

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
        bias = self.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            found: torch.Tensor = _StraightThrough.apply(x, bias, self)  # type: ignore[no-untyped-call]
            return found
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) times the weight, plus the bias: (..., out_features)."""
        out = self.product(x) if x.is_cuda else self.reference(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    # --- several layers in one: their weights, row by row, one below the other ---

    # Stored tensors with the weight's rows -> how many of the weight's rows one of theirs stands for.
    by_row: ClassVar[Mapping[str, int]] = {"weight_data": 1, "weight_scale": 1}
    # Scales of a whole weight, float32 (1,); several weights' are held row by row, (out_features, 1).
    by_weight: ClassVar[tuple[str, ...]] = ()
    # Stored tensors that a subclass joins itself.
    joined_apart: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def joined(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The stored form of several layers' weights, one below the other. Nothing is rounded again: their products
        are what they were one by one.

        Raises:
            Apart: They cannot be joined; the message says why.
        """
        found = {name: _below([getattr(layer, name) for layer in layers]) for name in cls.by_row}
        for name in cls.by_weight:
            each = [getattr(layer, name).reshape(1, 1).expand(layer.out_features, 1) for layer in layers]
            found[name] = torch.cat(each)
        for name in set(layers[0]._buffers) - {*cls.by_row, *cls.by_weight, *cls.joined_apart}:
            first, *others = (layer._buffers[name] for layer in layers)
            for other in others:
                if (first is None) != (other is None) or (first is not None and not torch.equal(first, other)):
                    raise Apart(f"their {name} differ")
            if first is not None:
                found[name] = first
        return found

    def part(self, place: int, bounds: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The stored form of one of the layers joined in this one: views, where it can be.

        Args:
            place: Which one.
            bounds: First and last row (exclusive) of each.
        """
        first, last = bounds[place]
        found = {name: item for name, item in self._buffers.items() if item is not None}
        found |= {name: found[name][first // rows : -(-last // rows)] for name, rows in self.by_row.items()}
        return found | {name: found[name][first] for name in self.by_weight}

    def write(self, place: int, bounds: Sequence[tuple[int, int]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts another weight's stored form in the place of one of the layers joined in this one."""
        first, last = bounds[place]
        for name, rows in self.by_row.items():
            getattr(self, name)[first // rows : -(-last // rows)] = tensors[name]
        for name in self.by_weight:
            getattr(self, name)[first:last] = tensors[name]

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

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        """The weight in its stock dtype: the stock layer's own where it is kept, what is stored otherwise."""
        if self._stock:
            return self._stock[0].weight.detach().to(self.device, self.weight_dtype)
        dense = self.dense()
        return (dense if self.pre_quant_scale is None else dense * self.pre_quant_scale).to(self.weight_dtype)

    def retype(self, dtype: torch.dtype) -> None:
        self.weight_dtype = dtype
        if self._stock:
            kept = self._stock[0].weight
            kept.data = kept.data.to(dtype)

    @torch.no_grad()
    def store(self, value: torch.Tensor) -> None:
        if isinstance(value, WeightView) and value.layer is self:
            return
        value = self._judged(value)
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _StraightThrough(torch.autograd.Function):
    """A quantized layer's product. Rounding has no gradient worth the name, so going back it counts as none
    (straight-through, https://arxiv.org/abs/1308.3432): the gradient is that of a product with the stored weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.biased = layer, bias is not None and bias.requires_grad
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        back = None
        if ctx.needs_input_grad[0]:
            back = gradient @ ctx.layer.dense().to(gradient.dtype)
        own = gradient.flatten(0, -2).sum(0) if ctx.biased else None
        return back, own, None


_DATA: Any = torch.Tensor.data


class WeightView(torch.Tensor):
    """The weight of a stand-in as a tensor: shape, dtype and device cost nothing, values are made when they are
    needed, and what is written in place is stored.

    Attributes:
        layer: The layer.
    """

    layer: StandIn

    @staticmethod
    def __new__(cls, layer: StandIn) -> WeightView:
        found = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.weight_dtype, device=layer.device
        )
        found.layer = layer
        return found

    def __init__(self, layer: StandIn):
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
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        if isinstance(view, WeightView) and in_place:
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
