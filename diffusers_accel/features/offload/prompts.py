"""Embeddings of prompts that were seen before, in host memory: a prompt that is there needs no text encoder.

The layer is around the pipeline's `encode_prompt`, whose result depends on its arguments, the tokenizers, the weights
of the text encoders and settings of the pipeline alone. The key is made of the arguments' values. The weights are
represented by samples of every tensor, since a LoRA merge may leave no other trace, and by its counter of writes, since
one row of an embedding may be in no sample. A change of any weight, adapter, tokenizer or setting empties the cache.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import buffers_of, parameters_of, pytree, version_of
from ...core.submodules import submodules
from ..context import PipelineContext

# Values that are sampled of each tensor. A merged LoRA changes nearly all values of a matrix.
_SAMPLES = 16
_LORA_STATE = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class PromptCache:
    """The embeddings of one pipeline's prompts, the least recently used of which leave first.

    Args:
        context: The pipeline.
        limit: Bytes of host memory that embeddings may take.

    Attributes:
        hits: Number of calls in the last request that needed no text encoder.
        bytes: Bytes that embeddings take.
    """

    def __init__(self, context: PipelineContext, limit: int):
        self._context, self._limit = context, limit
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._state: Hashable = None
        self.hits = 0
        self.bytes = 0

    def around_encode_prompt(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the pipeline's `encode_prompt`."""
        key = _key((args, dict(sorted(kwargs.items()))))
        if key is None or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        self._look_for_changes()
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            self.hits += 1
            # Copies on the host too: their reader may write to them.
            return pytree.tree_map(
                lambda item: item[0].to(item[1], copy=True) if isinstance(item, _Kept) else item, found[0]
            )
        result = inner(*args, **kwargs)
        # The call itself may set what it reads: LTX-2 its tokenizer's padding, streaming weights that were replaced.
        self._look_for_changes()
        leaves = pytree.tree_leaves(result)
        if all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
            size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
            self._keep(key, result, size)
        return result

    def begin_request(self, pipe: Any) -> None:
        """A request hook: counts hits anew as a request begins, when it is given the pipeline."""
        if pipe is not None:
            self.hits = 0

    def clear(self) -> None:
        """Drops all embeddings."""
        self._entries.clear()
        self.bytes = 0

    def _keep(self, key: Hashable, result: Any, size: int) -> None:
        if size > self._limit:
            return
        kept = pytree.tree_map(
            lambda item: (
                _Kept((item.detach().to("cpu", copy=True), item.device)) if isinstance(item, torch.Tensor) else item
            ),
            result,
        )
        self._entries[key] = (kept, size)
        self.bytes += size
        while self.bytes > self._limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.bytes -= dropped

    def _look_for_changes(self) -> None:
        """Drops all embeddings if anything has changed that they depend on."""
        state = self._encoders()
        if state != self._state:
            self.clear()
            self._state = state

    def _encoders(self) -> Hashable:
        """The state of everything that `encode_prompt` depends on besides its arguments."""
        pipe = self._context.pipe
        denoisers = {denoiser.name for denoiser in self._context.denoisers}
        found: list[Hashable] = [_settings(pipe)]
        samples: list[torch.Tensor] = []
        for name, item in pipe.components.items():
            if isinstance(item, nn.Module):
                if name in denoisers or (hasattr(item, "encode") and hasattr(item, "decode")):
                    continue
                for part in submodules(item):
                    own = vars(part)
                    # Not `id`, which another module may have once this one is gone.
                    found.append((weakref.ref(part), part.training))
                    if "scaling" in own:  # a LoRA layer
                        found += [str(getattr(part, key, None)) for key in _LORA_STATE]
                    for tensor in (*parameters_of(part).values(), *buffers_of(part).values()):
                        if tensor is not None and tensor.numel():
                            version = None if tensor.is_inference() else version_of(tensor)
                            found.append((tensor.dtype, tuple(tensor.shape), version))
                            samples.append(tensor)
            elif item is not None and ("tokenizer" in name or "processor" in name):
                for each in (item, getattr(item, "tokenizer", None), getattr(item, "image_processor", None)):
                    if each is not None:
                        length = len(each) if hasattr(each, "__len__") else 0
                        tokens = str(getattr(each, "special_tokens_map", None))
                        found.append((name, weakref.ref(each), length, tokens, _settings(each)))
        return (*found, _digest(samples))


class _Kept(tuple):
    """A tensor on the host, and the device that it is for. A leaf of a tree, though it is a tuple."""

    __slots__ = ()


def _settings(item: Any) -> Hashable:
    """The public attributes of an instance that are plain values, or lists of them."""
    values = {name: _key(value) for name, value in vars(item).items() if isinstance(value, (*_PLAIN, list, tuple))}
    return tuple((name, value) for name, value in values.items() if value is not None and not name.startswith("_"))


def _digest(tensors: list[torch.Tensor]) -> str:
    """A digest of samples of tensors: one transfer for each device and dtype."""
    groups: dict[Hashable, list[torch.Tensor]] = {}
    for tensor in tensors:
        try:
            flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
            count = min(_SAMPLES, flat.numel())
            # In integers: float32 rounds the last index of a large tensor beyond its end.
            places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
            groups.setdefault((flat.device, flat.dtype), []).append(flat[places])
        except (RuntimeError, NotImplementedError):  # another package's tensor, or one without values
            continue
    found = hashlib.sha256()
    for items in groups.values():
        joined = torch.cat([item.view(torch.uint8) for item in items])
        found.update(joined.cpu().numpy().tobytes())
    return found.hexdigest()


def _key(value: Any) -> Hashable | None:
    """The value of arguments, for comparison; `None` if one has no value that can be compared."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().reshape(-1)
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
        return ("tensor", str(value.dtype), tuple(value.shape), str(value.device), digest)
    if isinstance(value, Mapping):
        items = [(key, _key(item)) for key, item in value.items()]
        return None if any(item is None for _, item in items) else tuple(items)
    if isinstance(value, (list, tuple)):
        found = [_key(item) for item in value]
        return None if any(item is None for item in found) else (type(value).__name__, *found)
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # pictures of PIL, arrays of NumPy
        mode = getattr(value, "mode", None)
        # The bytes of such pictures are indices.
        palette = str(value.getpalette("RGBA")) if mode in ("P", "PA") else None
        kind = (type(value).__name__, str(mode), palette, str(getattr(value, "dtype", None)))
        return (*kind, str(value.size), str(getattr(value, "shape", None)), hashlib.sha256(value.tobytes()).hexdigest())
    return None
