"""Precomputed modulations: the modulation products of all steps, computed before a request's first step.

In some models (FLUX.1, Qwen-Image, SD3) every block computes its modulation from an embedding of the timestep and the
prompt. These products have one row each, and read up to a third of the model's weights on every step. At a request's
first embedding, the stock module computes the embeddings of all steps, and one GEMM per layer computes all products.
Rewritten graphs look the products up (`kernels/linear/precomputed.py`) after comparing their input on the GPU. The
weights are read at the start of a request: a write in place takes effect with the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.linear import QuantizedLinear
from ...kernels.linear.precomputed import (
    PrecomputedInputs,
    PrecomputedOutputs,
    can_precompute,
    register_precomputed,
)
from ...kernels.linear.skinny import MAX_ROWS
from ...models.adapter import Modulation
from ..context import Denoiser, PipelineContext

# Bounds the memory of the products: 32 steps take 67 MB for FLUX.1, and 142 MB for Qwen-Image.
_MOST_STEPS = 128


class PrecomputedModulations:
    """The precomputed modulations of one denoiser.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        modulation: The adapter's record of modulation layers and of their input.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, modulation: Modulation):
        self.context, self.denoiser, self.modulation = context, denoiser, modulation
        self._generation = 0
        # (shape, dtype, device) of the embedding -> buffers. CUDA graphs of several batch sizes hold their addresses.
        self._buffers: dict[Hashable, tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]]] = {}
        self._current: tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]] | None = None
        # Replaced buffers, kept for the running call, whose graphs still hold their addresses.
        self._replaced: Any = None
        self._branch: tuple[int, str] | None = None

    @property
    def layers(self) -> int:
        """Number of layers with precomputed products in the last request."""
        return 0 if self._current is None else len(self._current[1])

    @property
    def missed(self) -> int:
        """Number of products of these layers that the last request computed again, for another input. Reads from the
        device."""
        return 0 if self._current is None else int(self._current[0].misses)

    def generation(self) -> int:
        """The generation of the buffers. A new one invalidates CUDA graphs, which hold the old buffers' addresses."""
        return self._generation

    def around_embedding(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the embedding module."""
        step = self.context.clock.current
        if step is None or step.step is None or not args or torch.is_grad_enabled():
            self._set_step(None)
            return inner(*args, **kwargs)
        branch = (step.request, step.branch)
        if self._branch is None or self._branch[0] != branch[0]:
            self._branch = branch
            for inputs, _ in self._buffers.values():
                inputs.set_step(None)
            self._current = self._precompute(step.step, inner, args, kwargs)
        self._set_step(step.step if branch == self._branch or not self.modulation.of_prompt else None)
        return inner(*args, **kwargs)

    def _set_step(self, step: int | None) -> None:
        if self._current is not None:
            self._current[0].set_step(step)

    def _precompute(
        self, first: int, inner: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]] | None:
        """The products of all steps from the given one on.

        Args:
            first: Index of the request's first step.
            inner: The stock embedding.
            args: Positional arguments of the first step's embedding; the first is the timestep (batch,).
            kwargs: Keyword arguments of the first step's embedding.

        Returns:
            The buffers of inputs, and address of a weight -> its products. `None` if the embedding has another form, or
            the schedule is too short or too long.
        """
        given, schedule, dtype = args[0], self.context.clock.timesteps, self.denoiser.dtype
        if not isinstance(given, torch.Tensor) or given.ndim != 1 or len(given) > MAX_ROWS:
            return None
        if not 2 <= len(schedule) - first <= len(schedule) <= _MOST_STEPS:
            return None
        rows = []
        for timestep in schedule[first:]:
            timestep = self.modulation.timestep(timestep.to(given.device), dtype).to(given.dtype)
            rows.append(inner(timestep.expand(given.shape), *args[1:], **kwargs))
        if not isinstance(rows[0], torch.Tensor) or rows[0].ndim != 2:
            return None
        found = torch.stack([rows[0]] * first + rows)
        layers = self._layers(dtype, found)
        if not layers:
            return None
        inputs, before = self._buffers_for(found)
        inputs.load(found)
        activated = F.silu(found).flatten(0, 1)
        known: dict[int, PrecomputedOutputs] = {}
        for layer in layers:
            address = _stored(layer).data_ptr()
            made = before.get(address)
            if made is None:
                with torch.inference_mode(False):
                    made = PrecomputedOutputs(inputs, found.new_empty((*inputs.rows.shape[:2], layer.out_features)))
            made.outputs[: len(found)] = _product(layer, activated).view(*found.shape[:2], -1)
            known[address] = made
        before.clear()
        before.update(known)
        register_precomputed(known)
        return inputs, before

    def _buffers_for(self, rows: torch.Tensor) -> tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]]:
        """Buffers for embeddings (steps, batch, features). Larger ones replace kept ones that are too small."""
        form = (rows.shape[1:], rows.dtype, rows.device)
        kept = self._buffers.get(form)
        if kept is not None and kept[0].has_room_for(rows):
            return kept
        if kept is not None:
            # Graphs with the smaller buffers are replayed once more, in this call. No product is found there.
            self._generation += 1
            self._replaced = kept
        self._buffers[form] = (PrecomputedInputs(rows), {})
        return self._buffers[form]

    def _layers(self, dtype: torch.dtype, rows: torch.Tensor) -> list[Any]:
        """The modulation layers that a rewritten graph computes by a product of a few rows.

        Args:
            dtype: The denoiser's dtype.
            rows: Embeddings (steps, batch, features).
        """
        found = []
        for block in self.denoiser.adapter.blocks(self.denoiser.module):
            for path in self.modulation.layers:
                try:
                    layer: Any = block.get_submodule(path)
                except AttributeError:
                    continue
                layer = getattr(layer, "base_layer", layer)  # the stock layer of a LoRA layer
                if not can_precompute(layer, dtype):
                    continue
                if layer.in_features == rows.shape[-1] and _stored(layer).device == rows.device:
                    found.append(layer)
        return found


def _stored(layer: Any) -> torch.Tensor:
    """A layer's weight in its stored format."""
    found: torch.Tensor = layer.weight_data if isinstance(layer, QuantizedLinear) else layer.weight
    return found


def _product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer's product with unrounded activations and widened 8-bit weights, equal to the kernel for a few rows.

    Args:
        layer: A linear or a quantized linear layer.
        x: Activations (rows, in_features).

    Returns:
        (rows, out_features) in the dtype of `x`.
    """
    if not isinstance(layer, QuantizedLinear):
        return F.linear(x, layer.weight, layer.bias)
    out = F.linear(x, layer.weight_data.to(x.dtype)).float() * layer.weight_scale.view(1, -1)
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)
