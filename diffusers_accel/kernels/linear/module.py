"""Base classes of the modules that take a stock linear layer's place: `LinearProxy` and `QuantizedLinear`.

To its surroundings a proxy still is the `nn.Linear` that it replaces. Its `state_dict` holds the stock weight. Its
`weight` is a `WeightView`: a tensor of the stock shape and dtype whose values are dequantized on first use. A write to
the view (a LoRA merge, say) is quantized into the stored form.

The stored form lies in buffers. Optimizers and dtype casts pass buffers by; `.to(device)`, offloading and hooks carry
them along.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...compat.torch_private import StateMethods, buffers_of, version_of
from .weight_view import WeightView

# Attribute of a module that is no `LinearProxy` (another package's layer): the stock layer that it replaces. The value
# is a tuple, so that the stock layer is not registered as a child.
STOCK = "_diffusers_accel_stock"


class ActivationCache:
    """One value derived from an activation tensor, shared by the layers that read this tensor.

    Q, K and V read one tensor, so it is quantized for the first of them only. The value lives as long as the tensor,
    and is used only while the tensor's version counter is unchanged.
    """

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[torch.Tensor], int, str, Any] | None = None

    def get(self, x: torch.Tensor, key: str, compute: Callable[[torch.Tensor], Any]) -> Any:
        """The cached value for a tensor, or `compute(x)`.

        Args:
            x: The activation. Tensors of inference mode have no version counter, so nothing is cached for them.
            key: Name of the derived value: one of another key is not returned.
            compute: Makes the value.
        """
        if x.is_inference():
            return compute(x)
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1:3] == (version_of(x), key):
            return entry[3]
        self._entry = None
        value = compute(x)
        self._entry = (weakref.ref(x, self._expire), version_of(x), key, value)
        return value

    def clear(self) -> None:
        """Drops the cached value."""
        self._entry = None

    def _expire(self, reference: Any) -> None:
        if self._entry is not None and self._entry[0] is reference:
            self._entry = None

    def __deepcopy__(self, memo: Any) -> ActivationCache:
        return ActivationCache()


class CannotPack(ValueError):
    """Layers cannot be packed into one. The message is the reason, phrased to follow the layers' names."""


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors concatenated along their rows, as bytes: `torch.cat` does not support all low-bit dtypes."""
    return torch.cat([item.view(torch.uint8) for item in tensors]).view(tensors[0].dtype)


class LinearProxy(StateMethods, nn.Linear):
    """Base of the modules that take a stock layer's place.

    A subclass implements `materialize`, which reads the weight, and `set_weight`, which writes it.

    Attributes:
        kind: Name of the format, as `stats` prints it.
        weight_dtype: The dtype that `weight` reports: the stock weight's, unless the model was cast since.
    """

    kind: ClassVar[str]
    weight_dtype: torch.dtype

    @property
    def stock(self) -> nn.Linear | None:
        """The stock layer, or `None` if its weight was dropped."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the stored tensors."""
        raise NotImplementedError

    def materialize(self) -> torch.Tensor:
        """The weight, (out_features, in_features), in `weight_dtype` on `device`."""
        raise NotImplementedError

    def set_weight(self, value: torch.Tensor) -> None:
        """Replaces the weight.

        Args:
            value: (out_features, in_features), any floating-point dtype and device.

        Raises:
            ValueError: The shape differs.
        """
        raise NotImplementedError

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Changes the dtype that `weight` reports. `load_state_dict(assign=True)` calls it before `set_weight`."""

    def _validated(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"The weight of this {self.kind} layer has shape {(self.out_features, self.in_features)}, not "
                f"{tuple(value.shape)}. Assign a tensor of that shape."
            )
        return value.detach()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a Parameter beside the stored form
            self.set_weight(value)
        else:
            super().__setattr__(name, value)

    def save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super().save_to_state_dict(destination, prefix, keep_vars)
        # On the host: the dequantized weights of all layers may not fit on the device.
        stock = self.stock
        destination[prefix + "weight"] = stock.weight.detach() if stock is not None else self.materialize().cpu()

    def load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        given = state_dict.pop(prefix + "weight", None)
        super().load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if given is None:
            if strict:
                missing_keys.append(prefix + "weight")
            return
        state_dict[prefix + "weight"] = given
        try:
            if local_metadata.get("assign_to_params_buffers", False):
                self.set_weight_dtype(given.dtype)
            self.set_weight(given)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")


class QuantizedLinear(LinearProxy):
    """Base of the layers that store their weight in a low-bit format.

    A subclass implements `quantize` (weight to stored tensors), `dequantize` (stored tensors to float32),
    `forward_cuda` and `forward_native`.

    Args:
        linear: The stock layer. The new layer shares its bias parameter and quantizes its weight on the weight's
            device.

    Attributes:
        weight_data: The quantized values; a subclass documents dtype and shape.
        weight_scale: The scales of the values; a subclass documents dtype and shape.
        bias: The stock layer's bias, (out_features,), or `None`.
        pre_quant_scale: float32 (in_features,), or `None`. Multiplies the input feature by feature, where a checkpoint
            has smoothed its activations.
        activation_cache: Shared by the layers of one model.
    """

    weight_data: torch.Tensor
    weight_scale: torch.Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]
    pre_quant_scale: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        self._init_from(linear)
        with torch.no_grad():
            for name, tensor in self.quantize(linear.weight.detach()).items():
                self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_tensors(cls, linear: nn.Linear, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        """A layer from stored tensors, for the place of a stock layer whose weight is not loaded.

        Args:
            linear: The stock layer. Sizes, bias, dtype of the weight and training mode are taken from it.
            tensors: Buffer name -> tensor, as `quantize` returns them.
        """
        layer = cls.__new__(cls)
        layer._init_from(linear)
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor, persistent=False)
        return layer

    def _init_from(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self.weight_dtype = linear.weight.dtype
        # In a tuple, so that the stock layer is not registered as a child.
        self._stock: tuple[nn.Linear, ...] = ()
        self.activation_cache = ActivationCache()
        self.register_buffer("pre_quant_scale", None, persistent=False)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored form of a weight, (out_features, in_features): buffer name -> tensor."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """The weight that the stored tensors stand for: float32 (out_features, in_features)."""
        raise NotImplementedError

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on a CUDA device.

        Args:
            x: (..., in_features).

        Returns:
            (rows, out_features), dtype of `x`.
        """
        raise NotImplementedError

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        """The reference in plain torch, summed in float32. It runs on devices other than CUDA.

        Args:
            x: (rows, in_features).

        Returns:
            (rows, out_features), dtype of `x`.
        """
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        bias = self.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            out: torch.Tensor = _StraightThrough.apply(x, bias, self)  # type: ignore[no-untyped-call]
            return out
        return self.quantized_linear(x)

    def quantized_linear(self, x: torch.Tensor) -> torch.Tensor:
        """The layer without gradients: (..., in_features) to (..., out_features)."""
        out = self.forward_cuda(x) if x.is_cuda else self.forward_native(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    # --- packing: the weights of several layers, concatenated along their rows (`packed.py`) ---

    # Stored tensors that have the weight's rows -> number of weight rows that one of their rows stands for.
    row_tensors: ClassVar[Mapping[str, int]] = {"weight_data": 1, "weight_scale": 1}
    # Scales of a whole weight, float32 (1,). A packed layer holds them per row, (out_features, 1).
    per_tensor_scales: ClassVar[tuple[str, ...]] = ()
    # Stored tensors that a subclass packs in its own `pack_layers`.
    custom_packed: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def pack_layers(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The stored form of several layers' weights, concatenated along their rows. Nothing is quantized again, so
        the outputs equal those of the separate layers.

        Raises:
            CannotPack: The layers differ in a tensor that all rows share.
        """
        packed = {name: _concatenated([getattr(layer, name) for layer in layers]) for name in cls.row_tensors}
        for name in cls.per_tensor_scales:
            scales = [getattr(layer, name).reshape(1, 1).expand(layer.out_features, 1) for layer in layers]
            packed[name] = torch.cat(scales)
        for name in set(buffers_of(layers[0])) - {*cls.row_tensors, *cls.per_tensor_scales, *cls.custom_packed}:
            values: list[Any] = [buffers_of(layer)[name] for layer in layers]
            first, *others = values
            for other in others:
                if (first is None) != (other is None) or (first is not None and not torch.equal(first, other)):
                    raise CannotPack(f"their {name} differ")
            if first is not None:
                packed[name] = first
        return packed

    def slice_tensors(self, index: int, row_ranges: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The stored form of one packed layer: views where the format allows views.

        Args:
            index: Index of the packed layer.
            row_ranges: First and last (exclusive) weight row of each packed layer.
        """
        first, last = row_ranges[index]
        tensors = {name: item for name, item in buffers_of(self).items() if item is not None}
        tensors |= {name: tensors[name][first // rows : -(-last // rows)] for name, rows in self.row_tensors.items()}
        return tensors | {name: tensors[name][first] for name in self.per_tensor_scales}

    def write_slice(
        self, index: int, row_ranges: Sequence[tuple[int, int]], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Overwrites the stored form of one packed layer.

        Args:
            index: Index of the packed layer.
            row_ranges: First and last (exclusive) weight row of each packed layer.
            tensors: Buffer name -> tensor, as `quantize` returns them.
        """
        first, last = row_ranges[index]
        for name, rows in self.row_tensors.items():
            getattr(self, name)[first // rows : -(-last // rows)] = tensors[name]
        for name in self.per_tensor_scales:
            getattr(self, name)[first:last] = tensors[name]

    # --- the weight, as the surroundings see it ---

    def keep_stock(self, linear: nn.Linear) -> None:
        """Keeps the stock layer. `weight` and `state_dict` then show its weight, which may lie on another device."""
        self._stock = (linear,)

    @property
    def stock(self) -> nn.Linear | None:
        """The stock layer, or `None` if it was not kept."""
        return self._stock[0] if self._stock else None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors, without the bias."""
        return sum(item.numel() * item.element_size() for item in self.buffers(recurse=False))

    @property
    def device(self) -> torch.device:
        return next(self.buffers(recurse=False)).device

    @torch.no_grad()
    def materialize(self) -> torch.Tensor:
        """The weight in `weight_dtype`: the kept stock layer's, or else the dequantized one."""
        if self._stock:
            return self._stock[0].weight.detach().to(self.device, self.weight_dtype)
        weight = self.dequantize()
        return (weight if self.pre_quant_scale is None else weight * self.pre_quant_scale).to(self.weight_dtype)

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        self.weight_dtype = dtype
        if self._stock:
            kept = self._stock[0].weight
            kept.data = kept.data.to(dtype)

    @torch.no_grad()
    def set_weight(self, value: torch.Tensor) -> None:
        if isinstance(value, WeightView) and value.layer is self:
            return
        value = self._validated(value)
        if self._stock:
            kept = self._stock[0].weight
            kept.copy_(value.to(kept.device, kept.dtype))
        self.pre_quant_scale = None
        for name, tensor in self.quantize(value.to(self.device, self.weight_dtype)).items():
            setattr(self, name, tensor)

    def apply_to_tensors(self, function: Any, recurse: bool = True) -> nn.Module:
        # Stored tensors follow a change of device only. Viewed as bytes they are no floating-point tensors, so that
        # a cast of the model leaves them alone.
        buffers = buffers_of(self)
        stored = dict(buffers)
        buffers.clear()
        try:
            super().apply_to_tensors(function, recurse)
        finally:
            buffers.update(stored)
        for name, tensor in stored.items():
            if tensor is not None:
                buffers[name] = function(tensor.view(torch.uint8)).view(tensor.dtype)
        self.weight_dtype = function(torch.empty(0, dtype=self.weight_dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _StraightThrough(torch.autograd.Function):
    """A quantized layer with gradients by the straight-through estimator (https://arxiv.org/abs/1308.3432): rounding
    counts as the identity, so the gradient of the input is a product with the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.bias_requires_grad = layer, bias is not None and bias.requires_grad
        return layer.quantized_linear(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = gradient @ ctx.layer.dequantize().to(gradient.dtype)
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.bias_requires_grad else None
        return input_gradient, bias_gradient, None
