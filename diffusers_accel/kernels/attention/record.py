"""What an attention kernel is: a frozen record with a lazy loader and a sentence for every reason it cannot run.

Layout contract: query, key, value are (batch, sequence, heads, head_dim), the output has the query's shape (with the
value's head_dim). An LSE, where a kernel has one, is float32 (batch, heads, sequence), natural logarithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.platform import Device, has_module
from ...core.registry import Registry

NO_MASK, KEY_MASK, FULL_MASK = "none", "keys", "full"


# Cosines and sines of a rotary embedding, float32, broadcast to the tensor they turn.
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of query and key.

    Attributes:
        query: Its tables, float32, (batch or 1, sequence, heads or 1, channels): cosines and sines of equal strides,
            channels next to each other.
        key: The key's, of its own sequence and heads.
        halves: Which channels are the two parts of one complex number. If true, i and i + head_dim / 2, and tables
            have head_dim / 2 channels; if not, 2i and 2i + 1, and tables have head_dim channels, every value twice.
    """

    query: Tables
    key: Tables
    halves: bool = False


@dataclass(frozen=True)
class QKNorm:
    """An RMS norm over each head's channels or over those of all heads, of which query and key have equally many:
    weights of query and key, (head_dim,) or (heads * head_dim,), and epsilon."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Inputs:
    """What one attention call is given.

    Attributes:
        query: (batch, sequence, heads, head_dim).
        key: (batch, key sequence, kv_heads, head_dim); `kv_heads` divides the query's heads.
        value: (batch, key sequence, kv_heads, value_dim).
        attn_mask: Boolean (True takes part) or additive, broadcast to (batch, heads, sequence, key sequence).
        is_causal: Hide later keys; the diagonal starts at the top left.
        scale: Of the logits; head_dim ** -0.5 if `None`.
        return_lse: Also return the logsumexp.
        rotary: A rotary embedding that query and key still lack.
        norm: A norm that they still lack before it. Both are given only to kernels whose record says that they fold.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    return_lse: bool = False
    rotary: Rotary | None = None
    norm: QKNorm | None = None

    @property
    def grouped(self) -> bool:
        """Whether key and value have fewer heads than the query."""
        return self.query.shape[2] != self.key.shape[2]

    @property
    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as (batch, heads, sequence, head_dim)."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)

    def ungrouped(self) -> Inputs:
        """The same with as many key and value heads as query heads, for kernels that want them so."""
        if not self.grouped:
            return self
        groups = self.query.shape[2] // self.key.shape[2]
        key, value = (item.repeat_interleave(groups, dim=2) for item in (self.key, self.value))
        return replace(self, key=key, value=value)


# Returns the output, or (output, LSE) if `return_lse`.
AttentionFunction = Callable[[Inputs], Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a kernel must know of one attention call to say whether it can take it. `None` is not judged.

    Attributes:
        dtype: Of query, key and value.
        head_dim: Of query and key.
        value_dim: Of the value.
        device: Type of the device, as in `torch.device.type`.
        mask: `"none"`, `"keys"` (the same for every query and head: padding) or `"full"`.
        queries: Length of the query.
        keys: Length of the key.
        causal: Whether the diagonal hides later keys; it starts at the top left.
        square: Whether query and key are equally long.
        grouped: Whether key and value have fewer heads than the query.
        lse: Whether the logsumexp is wanted.
    """

    dtype: torch.dtype | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    device: str | None = None
    mask: str = NO_MASK
    queries: int | None = None
    keys: int | None = None
    causal: bool = False
    square: bool = True
    grouped: bool = False
    lse: bool = False

    @classmethod
    def of(cls, inputs: Inputs) -> Call:
        """The call that these tensors make."""
        return cls(
            dtype=inputs.query.dtype,
            head_dim=inputs.query.shape[-1],
            value_dim=inputs.value.shape[-1],
            device=inputs.query.device.type,
            mask=mask_kind(inputs.attn_mask),
            queries=inputs.query.shape[1],
            keys=inputs.key.shape[1],
            causal=inputs.is_causal,
            square=inputs.query.shape[1] == inputs.key.shape[1],
            grouped=inputs.grouped,
            lse=inputs.return_lse,
        )


def mask_kind(attn_mask: torch.Tensor | None) -> str:
    """`"keys"` for a mask that broadcasts over heads and queries, by its shape alone: nothing is read from a device."""
    if attn_mask is None:
        return NO_MASK
    return KEY_MASK if attn_mask.ndim == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1 else FULL_MASK


def key_bias(inputs: Inputs) -> torch.Tensor | None:
    """A `"keys"` mask, boolean or additive, as what is added to the logits: float32 (batch, key sequence)."""
    if inputs.attn_mask is None:
        return None
    rows = inputs.attn_mask[:, 0, 0]
    if rows.dtype == torch.bool:
        rows = torch.zeros(rows.shape, device=rows.device).masked_fill_(~rows, float("-inf"))
    return rows.float().expand(inputs.query.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """An attention kernel.

    Args:
        name: As a user writes it.
        load: Imports what is needed and returns a function of `Inputs`.
        modules: Alternative modules it comes from; any one of them is enough. Empty for torch's own.
        install: How to get them.
        architectures: CUDA compute capabilities it runs on; `None` for any CUDA device; empty for every device.
        at_least: Lowest CUDA compute capability it runs on.
        dtypes: Input types it takes; empty for all.
        head_dims: Head dimensions it takes; `None` for all.
        mask: Whether it takes any attention mask.
        key_mask: Whether it takes a mask that is the same for every query and head (padding).
        shortest: Fewest queries, and fewest keys, that it takes.
        key_multiple: What the number of keys must be a multiple of.
        causal: Whether it takes `is_causal`, whose diagonal starts at the top left, as SDPA's does.
        causal_square: Whether it takes `is_causal` only for equal lengths (elsewhere its diagonal lies otherwise).
        gqa: Whether it takes fewer key and value heads than query heads.
        lse: Whether it can return the logsumexp.
        exact: Whether it computes in the input's own precision (no quantization).
        folds: Whether it applies a QK-norm and a rotary embedding that it is given.
        auto: Whether `"auto"` may choose it; a user's own function is used by name only.
        refusal: Why an installed package cannot be used (a version that is wrong somewhere, say), or `None`.
    """

    name: str
    load: Callable[[], AttentionFunction]
    modules: tuple[str, ...] = ()
    install: str = ""
    architectures: tuple[tuple[int, int], ...] | None = ()
    at_least: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: tuple[int, ...] | None = None
    mask: bool = True
    key_mask: bool = False
    shortest: int = 1
    key_multiple: int = 1
    causal: bool = True
    causal_square: bool = False
    gqa: bool = True
    lse: bool = False
    exact: bool = True
    folds: bool = False
    auto: bool = True
    refusal: Callable[[], str | None] = lambda: None

    @property
    def on_cuda(self) -> bool:
        """Whether it needs a CUDA device."""
        return self.architectures != () or self.at_least is not None

    @property
    def gpus(self) -> str:
        """What it runs on, for a reader: `"sm_90, sm_100"`, `"sm_80 and later"`, `"any, and CPUs"`."""
        if self.architectures:
            return ", ".join(f"sm_{major}{minor}" for major, minor in self.architectures)
        if self.at_least is not None:
            return f"sm_{self.at_least[0]}{self.at_least[1]} and later"
        return "any" if self.on_cuda else "any, and CPUs"

    @property
    def dims(self) -> str:
        """Its head dimensions, for a reader: `"8 to 256 by 8"`, `"64, 96, 128, 192, 256"`, `"any"`."""
        if self.head_dims is None:
            return "any"
        steps = {after - before for before, after in itertools.pairwise(self.head_dims)}
        if len(self.head_dims) > 4 and len(steps) == 1:
            return f"{self.head_dims[0]} to {self.head_dims[-1]} by {steps.pop()}"
        return ", ".join(map(str, self.head_dims))

    def missing(self, device: Device) -> str | None:
        """Why the kernel cannot run on `device`, or `None` if it can."""
        if self.modules and not any(has_module(name) for name in self.modules):
            return f"needs the package {' or '.join(self.modules)} ({self.install})."
        if self.on_cuda and device.type != "cuda":
            return f"needs a CUDA device; this is {device}."
        if self.architectures and device.arch not in self.architectures:
            return f"is built for {self.gpus}; this is {device}."
        if self.at_least is not None and device.arch is not None and device.arch < self.at_least:
            return f"needs {self.gpus}; this is {device}."
        return self.refusal() or self._broken()

    def _broken(self) -> str | None:
        """Why an installed package does not load (built for another CUDA or torch, say), or `None` if it does."""
        if not self.modules:
            return None
        try:
            self.load()
        except Exception as error:  # whatever a foreign package raises while it is imported
            return f"is installed and does not load: {type(error).__name__}: {error}."
        return None

    def refuses(self, call: Call) -> str | None:
        """Why the kernel cannot take such a call, or `None` if it can."""
        if call.device is not None and self.on_cuda and call.device != "cuda":
            return f"runs on CUDA, and the call is on {call.device}"
        if call.dtype is not None and self.dtypes and call.dtype not in self.dtypes:
            return f"takes {', '.join(str(item) for item in self.dtypes)}, not {call.dtype}"
        if call.head_dim is not None and self.head_dims is not None:
            if call.head_dim not in self.head_dims:
                return f"takes head_dim {self.dims}, not {call.head_dim}"
            if call.value_dim is not None and call.value_dim != call.head_dim:
                return f"takes values of the key's head_dim, not {call.value_dim} beside {call.head_dim}"
        if call.mask != NO_MASK and not self.mask and not (self.key_mask and call.mask == KEY_MASK):
            return "takes no attention mask but one over keys alone" if self.key_mask else "takes no attention mask"
        lengths = [length for length in (call.queries, call.keys) if length is not None]
        if lengths and min(lengths) < self.shortest:
            return f"takes {self.shortest} queries and keys or more, not {min(lengths)}"
        if call.keys is not None and call.keys % self.key_multiple:
            return f"is wrong unless the number of keys is a multiple of {self.key_multiple}; these are {call.keys}"
        if call.causal and not self.causal:
            return "takes no causal mask"
        if call.causal and self.causal_square and not call.square:
            return "takes a causal mask for equal lengths only"
        if call.grouped and not self.gqa:
            return "takes no grouped key and value heads"
        if call.lse and not self.lse:
            return "returns no logsumexp"
        return None


KERNELS: Registry[AttentionKernel] = Registry("attention kernel", "register_attention", ("auto",))


def recipes(backend: str) -> tuple[str, ...]:
    """The recipes of a quantized backend, which its records name behind a slash, the default first."""
    return tuple(name.partition("/")[2] for name in KERNELS if name.startswith(f"{backend}/"))


def register_attention(name: str, function: Any = None, *, replace: bool = False, **properties: Any) -> Any:
    """Registers a user's attention function under a name that `attention=` accepts. Also usable as a decorator.

    Args:
        name: The name.
        function: `fn(query, key, value, attn_mask=None, is_causal=False, scale=None)` on tensors of shape (batch,
            sequence, heads, head_dim), returning the query's shape and dtype. Key and value heads are repeated to the
            query's number of heads before it is called.
        replace: Allow the name to be registered already.
        properties: What it supports, as in `AttentionKernel` (e.g. `mask=False`, `dtypes=(torch.bfloat16,)`). A call it
            does not support runs on SDPA, with a warning, and is counted there.

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def adapted(inputs: Inputs) -> torch.Tensor:
            x = inputs.ungrouped()
            query, value = x.query, x.value
            out = function(query, x.key, value, attn_mask=x.attn_mask, is_causal=x.is_causal, scale=x.scale)
            expected = (*query.shape[:3], value.shape[3])
            if not isinstance(out, torch.Tensor) or tuple(out.shape) != expected or out.dtype != query.dtype:
                got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
                raise ValueError(
                    f"The attention function registered as {name!r} returned {got}; it must return {expected} "
                    f"{query.dtype}, which is (batch, sequence, heads, head_dim) as it was given."
                )
            return out

        record = AttentionKernel(**{"name": name, "load": lambda: adapted, "auto": False, "shortest": 0, **properties})
        KERNELS.add(name, record, replace=replace)
        return function

    return register if function is None else register(function)
