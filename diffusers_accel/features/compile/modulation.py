"""Modulations of all steps, made before the first.

Some models make what modulates their tokens anew in every block (FLUX.1, Qwen-Image, SD3), from an embedding of the
time step and the prompt: products of one row, which read up to a third of the model's weights once a step. When a
request's first embedding is made, those of its other steps are too, by the stock module itself, and the layers'
products of all of them at once. Rewritten graphs look them up (`kernels/linear/precomputed.py`), after comparing their
input on the GPU. Weights are read when a request begins: one that is written to in place before it ends counts from the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.linear import QuantizedLinear
from ...kernels.linear.precomputed import PrecomputedInputs, PrecomputedOutputs, register_precomputed
from ...kernels.linear.skinny import MAX_ROWS
from ...models.adapter import Modulation
from ..context import Denoiser, PipelineContext

# Kinds of quantized layers that a rewritten graph multiplies without rounding a few rows.
_NARROW = ("fp8", "int8")
# Of more steps the products would take much memory: 32 steps of FLUX.1 take 67 MB, of Qwen-Image 142.
_MOST_STEPS = 128


class Modulations:
    """What is known of one denoiser's modulations.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        modulation: Which layers make them, and how their input comes about.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, modulation: Modulation):
        self.context, self.denoiser, self.modulation = context, denoiser, modulation
        self._generation = 0
        # By the form of the embedding: CUDA graphs of several batch sizes know their buffers by their addresses.
        self._sets: dict[Hashable, tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]]] = {}
        self._current: tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]] | None = None
        # Kept for the call at hand, whose graphs still have their addresses.
        self._outgrown: Any = None
        self._branch: tuple[int, str] | None = None

    @property
    def layers(self) -> int:
        """Layers whose products of the last request were made beforehand."""
        return 0 if self._current is None else len(self._current[1])

    @property
    def missed(self) -> int:
        """Products of those layers that were made anew all the same, in the last request. Reads from the device."""
        return 0 if self._current is None else int(self._current[0].misses)

    def buffers(self) -> int:
        """Another number once CUDA graphs that know the buffers' addresses must not be played any more."""
        return self._generation

    def around_embedding(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the module that makes the embedding."""
        step = self.context.clock.current
        if step is None or step.step is None or not args or torch.is_grad_enabled():
            self._at(None)
            return inner(*args, **kwargs)
        branch = (step.request, step.branch)
        if self._branch is None or self._branch[0] != branch[0]:
            self._branch = branch
            for inputs, _ in self._sets.values():
                inputs.set_step(None)
            self._current = self._ahead(step.step, inner, args, kwargs)
        self._at(step.step if branch == self._branch or not self.modulation.of_prompt else None)
        return inner(*args, **kwargs)

    def _at(self, step: int | None) -> None:
        if self._current is not None:
            self._current[0].set_step(step)

    def _ahead(
        self, first: int, inner: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]] | None:
        """Makes the products of all steps from this one on; `None` where that cannot be done, or does not pay."""
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
        inputs, before = self._room(found)
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

    def _room(self, rows: torch.Tensor) -> tuple[PrecomputedInputs, dict[int, PrecomputedOutputs]]:
        """Buffers for inputs like these."""
        form = (rows.shape[1:], rows.dtype, rows.device)
        kept = self._sets.get(form)
        if kept is not None and kept[0].has_room_for(rows):
            return kept
        if kept is not None:
            # Graphs that know the smaller buffers are played in this call for the last time, and find nothing there.
            self._generation += 1
            self._outgrown = kept
        self._sets[form] = (PrecomputedInputs(rows), {})
        return self._sets[form]

    def _layers(self, dtype: torch.dtype, rows: torch.Tensor) -> list[Any]:
        """The layers whose weights a rewritten graph gives to a product of a few rows, and that take such rows."""
        found = []
        for block in self.denoiser.adapter.blocks(self.denoiser.module):
            for path in self.modulation.layers:
                try:
                    layer: Any = block.get_submodule(path)
                except AttributeError:
                    continue
                layer = getattr(layer, "base_layer", layer)  # beneath a LoRA
                plain = type(layer) is nn.Linear and layer.weight.dtype == dtype
                if not plain and getattr(layer, "kind", None) not in _NARROW:
                    continue
                if layer.in_features == rows.shape[-1] and _stored(layer).device == rows.device:
                    found.append(layer)
        return found


def _stored(layer: Any) -> torch.Tensor:
    """A layer's weight as it is stored."""
    found: torch.Tensor = layer.weight_data if isinstance(layer, QuantizedLinear) else layer.weight
    return found


def _product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Of many rows, in the type of `x`. Weights of 8 bits are widened, activations are not rounded: as in a product of
    a few rows."""
    if not isinstance(layer, QuantizedLinear):
        return F.linear(x, layer.weight, layer.bias)
    out = F.linear(x, layer.weight_data.to(x.dtype)).float() * layer.weight_scale.view(1, -1)
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)
