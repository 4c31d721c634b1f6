"""Packed linear layers: layers that read one tensor (e.g. query, key and value), computed as one product.

A `PackedLinear` holds the layers' weights concatenated along the output features. A `LinearSlice` takes each layer's
place in the model. The first called slice computes the whole product; the other slices return their columns of it.
Attention processors therefore need no change. A LoRA around a slice, a LoRA merged into a slice, and a `state_dict`
find the layer that they expect.

The product is kept for its input tensor only, and dropped once every slice has read it. Under a compiler the product is
a node of the graph. Tensors of inference mode have no version counter, so their slices compute separately.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import StateMethods, buffers_of
from ...core.hooks import has_layerwise_casting
from .module import ActivationCache, CannotPack, LinearProxy, QuantizedLinear
from .record import kind_of
from .weight_view import WeightView


class _HiddenChild(StateMethods):
    """Mixin of the packed layer: a child module without entries in a `state_dict`. The slices write and read them."""

    def state_dict(self, *_: Any, destination: Any = None, **__: Any) -> Any:
        return {} if destination is None else destination

    def load_from_state_dict(self, *_: Any) -> None:
        pass


@functools.cache
def _hidden_class(kind: Any) -> Any:
    return type(kind.__name__, (_HiddenChild, kind), {"__module__": kind.__module__})


class PackedLinear:
    """Several linear layers as one.

    Args:
        layers: Plain layers, or quantized layers of one format, with the same number of input features. Their tensors
            are copied; `release_tensors` frees the originals.

    Attributes:
        layer: The one layer with all output features.
        row_ranges: First and last (exclusive) weight row of each packed layer.

    Raises:
        CannotPack: The layers differ in format, input features, dtype or device. Nothing was changed.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        reason = self.refusal(layers)
        if reason is not None:
            raise CannotPack(reason)
        ends = [sum(layer.out_features for layer in layers[: index + 1]) for index in range(len(layers))]
        self.row_ranges = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self.layer = self._pack(type(layers[0]), layers)
        self._output, self._slices_left = ActivationCache(), 0
        self._traced_input: torch.Tensor | None = None
        self._traced_output: torch.Tensor | None = None

    @staticmethod
    def refusal(layers: Sequence[nn.Linear]) -> str | None:
        """The reason why layers cannot be packed, or `None`. Stored tensors are not read, so packing may still raise
        `CannotPack`."""
        kinds = {type(layer) for layer in layers}
        if len(kinds) > 1:
            return f"their formats differ ({', '.join(sorted({kind_of(layer) for layer in layers}))})"
        (kind,) = kinds
        if kind is not nn.Linear and not issubclass(kind, QuantizedLinear):
            return f"they are {kind.__name__}"
        if kind is nn.Linear and any(type(layer.weight.data) is not torch.Tensor for layer in layers):
            return f"their weights are {type(layers[0].weight.data).__name__}"
        if any(has_layerwise_casting(layer) for layer in layers):
            return "diffusers casts their weights before and after each call (enable_layerwise_casting)"
        if len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
            return "their input features, dtypes or devices differ"
        return None

    @torch.no_grad()
    def _pack(self, kind: Any, layers: Sequence[Any]) -> nn.Linear:
        first = layers[0]
        shell = nn.Linear(
            first.in_features, self.row_ranges[-1][1], bias=False, device="meta", dtype=first.weight.dtype
        )
        shell.train(first.training)
        if any(layer.bias is not None for layer in layers):
            like = next(layer.bias for layer in layers if layer.bias is not None)
            biases = [like.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
            shell.bias = nn.Parameter(torch.cat(biases), requires_grad=like.requires_grad)
        if kind is nn.Linear:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            shell.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
            shell.__class__ = _hidden_class(nn.Linear)
            return shell
        packed = _hidden_class(kind).from_tensors(shell, kind.pack_layers(layers))
        packed.activation_cache = first.activation_cache
        return packed

    def __deepcopy__(self, memo: Any) -> PackedLinear:
        twin = object.__new__(PackedLinear)
        twin.row_ranges, twin.layer = self.row_ranges, copy.deepcopy(self.layer, memo)
        twin._output, twin._slices_left = ActivationCache(), 0
        twin._traced_input = twin._traced_output = None
        return twin

    def output_slice(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of one packed layer: its columns of the whole product.

        Args:
            x: (..., in_features).
            index: Index of the packed layer.

        Returns:
            (..., out_features of that layer), a view where the whole product was computed.
        """
        first, last = self.row_ranges[index]
        if torch.compiler.is_compiling():
            # The traced output is dropped after the last slice: a graph must not return it.
            if self._traced_output is None or self._traced_input is not x:
                self._traced_input, self._traced_output = x, self.layer(x)
                self._slices_left = len(self.row_ranges)
            output = self._traced_output
            self._slices_left -= 1
            if self._slices_left == 0:
                self._traced_input = self._traced_output = None
            return output[..., first:last]
        if x.is_inference():  # without a version counter a changed input would go unnoticed
            return self.standalone(index)(x)
        computed = False

        def compute(x: torch.Tensor) -> torch.Tensor:
            nonlocal computed
            computed = True
            return self.layer(x)

        output = self._output.get(x, "output", compute)
        self._slices_left = len(self.row_ranges) - 1 if computed else self._slices_left - 1
        if self._slices_left == 0:
            self._output.clear()
        return output[..., first:last]

    def standalone(self, index: int) -> nn.Linear:
        """One packed layer as a layer of its own, on views of the packed tensors where the format allows views."""
        first, last = self.row_ranges[index]
        layer = self.layer
        shell = nn.Linear(layer.in_features, last - first, bias=False, device="meta", dtype=layer.weight.dtype)
        shell.train(layer.training)
        if layer.bias is not None:
            shell.bias = nn.Parameter(layer.bias.detach()[first:last], requires_grad=layer.bias.requires_grad)
        if not isinstance(layer, QuantizedLinear):
            shell.weight = nn.Parameter(layer.weight.detach()[first:last], requires_grad=layer.weight.requires_grad)
            return shell
        kind: Any = type(layer).__mro__[2]  # after the class of `_hidden_class` and `_HiddenChild`
        alone: QuantizedLinear = kind.from_tensors(shell, layer.slice_tensors(index, self.row_ranges))
        alone.activation_cache = layer.activation_cache
        return alone


class LinearSlice(LinearProxy):
    """One layer of a `PackedLinear`, in that layer's place in the model.

    Args:
        packed: The packed layers. All slices hold it; the first slice registers its layer as a child.
        index: Index of the layer among the packed ones.
        original: The replaced layer, which the slice keeps. The layer's tensors may be released.
    """

    def __init__(self, packed: PackedLinear, index: int, original: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.training = original.training
        self._packed, self._index, self._original = packed, index, (original,)
        self._has_bias = original.bias is not None
        if index == 0:  # the model reaches the packed tensors (for `.to`, say) through the first slice
            self.packed = packed.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._packed.output_slice(x, self._index)

    def standalone(self) -> nn.Linear:
        """The slice as a layer of its own, on views of the packed tensors where the format allows views."""
        alone = self._packed.standalone(self._index)
        if not self._has_bias:
            alone.bias = None  # type: ignore[assignment]
        return alone

    @property
    def original(self) -> nn.Linear:
        """The layer whose place the slice takes."""
        return self._original[0]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return kind_of(self.original)

    @property
    def stock(self) -> nn.Linear | None:
        original = self.original
        return original.stock if isinstance(original, QuantizedLinear) else self.standalone()

    @property
    def device(self) -> torch.device:
        layer = self._packed.layer
        return layer.device if isinstance(layer, QuantizedLinear) else layer.weight.device

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._packed.layer.weight.dtype

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """(out_features,): a view of the packed bias; `None` if the original has none."""
        bias = self._packed.layer.bias
        first, last = self._packed.row_ranges[self._index]
        return bias[first:last] if self._has_bias and bias is not None else None

    @torch.no_grad()
    def materialize(self) -> torch.Tensor:
        stock = self.stock
        if stock is not None:
            return stock.weight.detach().to(self.device, self.weight_dtype)
        alone: Any = self.standalone()
        return alone.materialize()

    @torch.no_grad()
    def set_weight(self, value: torch.Tensor) -> None:
        if isinstance(value, WeightView) and value.layer is self:
            return
        value = self._validated(value)
        layer, (first, last) = self._packed.layer, self._packed.row_ranges[self._index]
        if not isinstance(layer, QuantizedLinear):
            layer.weight[first:last] = value
            return
        if self.stock is not None:
            kept = self.stock.weight
            kept.copy_(value.to(kept.device, kept.dtype))
        value = value.to(self.device, self.weight_dtype)
        if layer.pre_quant_scale is not None:  # all slices share it, so it stays
            value = value / layer.pre_quant_scale.to(value.dtype)
        layer.write_slice(self._index, self._packed.row_ranges, layer.quantize(value))

    def save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super().save_to_state_dict(destination, prefix, keep_vars)
        bias = self.bias
        if bias is not None:
            destination[prefix + "bias"] = bias.detach()

    def load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        given, bias = state_dict.get(prefix + "bias"), self.bias
        super().load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if bias is None or key != prefix + "bias"]
        if bias is not None and given is not None:
            bias.detach().copy_(given)
        elif bias is not None and strict:
            missing_keys.append(prefix + "bias")

    def extra_repr(self) -> str:
        first, last = self._packed.row_ranges[self._index]
        return f"{self.in_features}, {self.out_features}, rows {first} to {last} of a packed layer, kind={self.kind}"


def restore_tensors(item: LinearSlice) -> None:
    """Copies a slice's tensors back into its original layer, whose own were released."""
    original, alone = item.original, item.standalone()
    if isinstance(original, QuantizedLinear):
        assert isinstance(alone, QuantizedLinear)
        original.weight_dtype = alone.weight_dtype
        for name, tensor in buffers_of(alone).items():
            buffers_of(original)[name] = None if tensor is None else tensor.clone()
    else:
        original.weight.data = alone.weight.data.clone()
    if original.bias is not None and alone.bias is not None:
        original.bias.data = alone.bias.data.clone()


def release_tensors(layer: nn.Linear) -> None:
    """Frees the tensors of a layer that was packed; each becomes an empty tensor of its dtype."""
    if isinstance(layer, QuantizedLinear):
        buffers = buffers_of(layer)
        for name, tensor in buffers.items():
            buffers[name] = None if tensor is None else tensor.new_empty(0)
    else:
        layer.weight.data = layer.weight.data.new_empty(0)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.new_empty(0)


def stock_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of a model, at stock paths only: slices are listed, the packed layers behind them are not."""
    return ((path, module) for path, module in model.named_modules() if not isinstance(module, _HiddenChild))
