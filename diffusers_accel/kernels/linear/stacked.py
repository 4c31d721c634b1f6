"""Layers that read one tensor, as one product: query, key and value, say.

Their weights lie one below the other in a single layer, and each layer's place in the model is taken by a `Part`. The
first part that is called multiplies for all; the others find their columns done. So no processor need know of it, and
a LoRA around one of the parts, a merge into it or a `state_dict` meet the layer they expect.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...core.hooks import cast_layerwise
from .module import Apart, QuantizedLinear, RoundedOnce, StandIn, WeightView
from .record import kind_of


class _Within:
    """What a stacked layer is beside a linear one: a child that nobody sees in a `state_dict`, where its parts are."""

    def state_dict(self, *_: Any, destination: Any = None, **__: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


@functools.cache
def _within(kind: Any) -> Any:
    return type(kind.__name__, (_Within, kind), {"__module__": kind.__module__})


class Stack:
    """One layer for several.

    Args:
        layers: Plain ones, or quantized ones of one format, with equally many input features.

    Raises:
        Apart: They cannot be joined; the message says why. Nothing was changed.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        reason = self.refusal(layers)
        if reason is not None:
            raise Apart(reason)
        ends = [sum(layer.out_features for layer in layers[: place + 1]) for place in range(len(layers))]
        self.bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self.layer = self._joined(type(layers[0]), layers)
        self._once, self._left = RoundedOnce(), 0
        self._given: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    @staticmethod
    def refusal(layers: Sequence[nn.Linear]) -> str | None:
        """Why layers cannot be joined, as far as it shows without looking into what they store; `None` if it does
        not."""
        kinds = {type(layer) for layer in layers}
        if len(kinds) > 1:
            return f"their formats differ ({', '.join(sorted({kind_of(layer) for layer in layers}))})"
        (kind,) = kinds
        if kind is not nn.Linear and not issubclass(kind, QuantizedLinear):
            return f"they are {kind.__name__}"
        if kind is nn.Linear and any(type(layer.weight.data) is not torch.Tensor for layer in layers):
            return f"their weights are {type(layers[0].weight.data).__name__}"
        if any(cast_layerwise(layer) for layer in layers):
            return "diffusers casts their weights before and after each call (enable_layerwise_casting)"
        if len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
            return "their input features, types or devices differ"
        return None

    @torch.no_grad()
    def _joined(self, kind: Any, layers: Sequence[Any]) -> nn.Linear:
        first = layers[0]
        shell = nn.Linear(first.in_features, self.bounds[-1][1], bias=False, device="meta", dtype=first.weight.dtype)
        shell.train(first.training)
        if any(layer.bias is not None for layer in layers):
            like = next(layer.bias for layer in layers if layer.bias is not None)
            biases = [like.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
            shell.bias = nn.Parameter(torch.cat(biases), requires_grad=like.requires_grad)
        if kind is nn.Linear:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            shell.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
            shell.__class__ = _within(nn.Linear)
            return shell
        found = _within(kind).holding(shell, kind.joined(layers))
        found.rounded_once = first.rounded_once
        return found

    def __deepcopy__(self, memo: Any) -> Stack:
        found = object.__new__(Stack)
        found.bounds, found.layer = self.bounds, copy.deepcopy(self.layer, memo)
        found._once, found._left, found._given, found._found = RoundedOnce(), 0, None, None
        return found

    def product(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """The product of one of the layers, from that of all."""
        first, last = self.bounds[place]
        if torch.compiler.is_compiling():
            # Kept for as long as it is traced: a graph must not give it out.
            if self._found is None or self._given is not x:
                self._given, self._found, self._left = x, self.layer(x), len(self.bounds)
            found = self._found
            self._left -= 1
            if self._left == 0:
                self._given = self._found = None
            return found[..., first:last]
        if x.is_inference():  # such tensors do not count their changes, so that nothing can be kept for them
            return self.alone(place)(x)
        fresh = False

        def product(x: torch.Tensor) -> torch.Tensor:
            nonlocal fresh
            fresh = True
            return self.layer(x)

        found = self._once.of(x, "product", product)
        self._left = len(self.bounds) - 1 if fresh else self._left - 1
        if self._left == 0:
            self._once.forget()
        return found[..., first:last]

    def alone(self, place: int) -> nn.Linear:
        """One of the layers by itself, on the same storage where it can be."""
        first, last = self.bounds[place]
        layer = self.layer
        meta = nn.Linear(layer.in_features, last - first, bias=False, device="meta", dtype=layer.weight.dtype)
        meta.train(layer.training)
        if layer.bias is not None:
            meta.bias = nn.Parameter(layer.bias.detach()[first:last], requires_grad=layer.bias.requires_grad)
        if not isinstance(layer, QuantizedLinear):
            meta.weight = nn.Parameter(layer.weight.detach()[first:last], requires_grad=layer.weight.requires_grad)
            return meta
        kind: Any = type(layer).__mro__[2]  # behind _within's own class and _Within
        found: QuantizedLinear = kind.holding(meta, layer.part(place, self.bounds))
        found.rounded_once = layer.rounded_once
        return found


class Part(StandIn):
    """One of the layers of a stack, in its place in the model.

    Args:
        stack: The stack.
        place: Which of its layers.
        original: The layer whose place it takes; its weight is not needed any more.
    """

    def __init__(self, stack: Stack, place: int, original: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.training = original.training
        self._stack, self._place, self._original = stack, place, (original,)
        self._biased = original.bias is not None
        if place == 0:  # the model reaches the tensors through the first part
            self.stacked = stack.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._stack.product(x, self._place)

    def alone(self) -> nn.Linear:
        """The layer by itself, on the same storage where it can be."""
        found = self._stack.alone(self._place)
        if not self._biased:
            found.bias = None  # type: ignore[assignment]
        return found

    @property
    def original(self) -> nn.Linear:
        """The layer whose place it takes."""
        return self._original[0]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return kind_of(self.original)

    @property
    def stock(self) -> nn.Linear | None:
        original = self.original
        return original.stock if isinstance(original, QuantizedLinear) else self.alone()

    @property
    def device(self) -> torch.device:
        layer = self._stack.layer
        return layer.device if isinstance(layer, QuantizedLinear) else layer.weight.device

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._stack.layer.weight.dtype

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """Its share of the stack's bias: a view."""
        bias = self._stack.layer.bias
        first, last = self._stack.bounds[self._place]
        return bias[first:last] if self._biased and bias is not None else None

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        stock = self.stock
        if stock is not None:
            return stock.weight.detach().to(self.device, self.weight_dtype)
        found: Any = self.alone()
        return found.numbers()

    @torch.no_grad()
    def store(self, value: torch.Tensor) -> None:
        if isinstance(value, WeightView) and value.layer is self:
            return
        value = self._judged(value)
        layer, (first, last) = self._stack.layer, self._stack.bounds[self._place]
        if not isinstance(layer, QuantizedLinear):
            layer.weight[first:last] = value
            return
        if self.stock is not None:
            kept = self.stock.weight
            kept.copy_(value.to(kept.device, kept.dtype))
        value = value.to(self.device, self.weight_dtype)
        if layer.pre_quant_scale is not None:  # shared by all parts: it stays
            value = value / layer.pre_quant_scale.to(value.dtype)
        layer.write(self._place, self._stack.bounds, layer.encode(value))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bias = self.bias
        if bias is not None:
            destination[prefix + "bias"] = bias.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        given, bias = state_dict.get(prefix + "bias"), self.bias
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if bias is None or key != prefix + "bias"]
        if bias is not None and given is not None:
            bias.detach().copy_(given)
        elif bias is not None and strict:
            missing_keys.append(prefix + "bias")

    def extra_repr(self) -> str:
        first, last = self._stack.bounds[self._place]
        return f"{self.in_features}, {self.out_features}, rows {first} to {last} of a stack, kind={self.kind}"


def unstacked(part: Part) -> None:
    """Gives the original of a part its tensors back, from the stack."""
    original, alone = part.original, part.alone()
    if isinstance(original, QuantizedLinear):
        assert isinstance(alone, QuantizedLinear)
        original.weight_dtype = alone.weight_dtype
        for name, tensor in alone._buffers.items():
            original._buffers[name] = None if tensor is None else tensor.clone()
    else:
        original.weight.data = alone.weight.data.clone()
    if original.bias is not None and alone.bias is not None:
        original.bias.data = alone.bias.data.clone()


def emptied(layer: nn.Linear) -> None:
    """Lets a stacked layer's own tensors go."""
    if isinstance(layer, QuantizedLinear):
        for name, tensor in layer._buffers.items():
            layer._buffers[name] = None if tensor is None else tensor.new_empty(0)
    else:
        layer.weight.data = layer.weight.data.new_empty(0)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.new_empty(0)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of a model as stock code has them: of a stack, its parts."""
    return ((path, module) for path, module in model.named_modules() if not isinstance(module, _Within))
