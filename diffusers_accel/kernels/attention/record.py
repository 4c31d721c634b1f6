"""The record of an attention kernel: a lazy loader, its limits, and a sentence for every reason it cannot run.

Layout contract: query, key and value are (batch, sequence, heads, head_dim). The output has the query's shape, with the
value's head_dim. An LSE is float32 (batch, heads, sequence), natural logarithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ...core.platform import Device, has_module
from ...core.registry import Registry

NO_MASK, KEY_MASK, FULL_MASK = "none", "keys", "full"


# Cosines and sines of a rotary embedding, float32, broadcast to the rotated tensor.
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of query and key.

    Attributes:
        query: Cosines and sines of the query, float32, (batch or 1, sequence, heads or 1, channels), of equal strides
            and with contiguous channels.
        key: Cosines and sines of the key, float32, (batch or 1, key sequence, kv_heads or 1, channels), of equal
            strides and with contiguous channels.
        rope_style: The pairs of channels that form complex numbers. `"interleaved"`: channels 2i and 2i + 1; tables
            have head_dim channels, every value twice. `"half"`: channels i and i + head_dim / 2; tables have
            head_dim / 2 channels.
    """

    query: Tables
    key: Tables
    rope_style: str = "interleaved"


@dataclass(frozen=True)
class QKNorm:
    """An RMS norm of query and key.

    Attributes:
        query: Weight of the query: (head_dim,) for a norm over each head, (heads * head_dim,) for a norm over all
            heads. A norm over all heads needs as many heads of the key as of the query.
        key: Weight of the key, of the query weight's shape.
        eps: Epsilon.
    """

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class BlockChoice(Protocol):
    """Sparse attention of a call (`sparse.Sparse`)."""

    @property
    def within_tiles(self) -> bool:
        """Whether the kernel decides for each tile, by `threshold`, instead of `choose`."""
        ...

    def clustered(self, x: Inputs) -> tuple[Inputs, Callable[[Any], Any]]:
        """The call with its tokens in the order of their blocks, and a function that takes the order of its result
        back."""
        ...

    def threshold(self, keys: int) -> float:
        """The share of the running maximum below which the weights of a tile are left out."""
        ...

    def count_tiles(self, computed: torch.Tensor, every: int) -> None:
        """Counts a call whose kernel decided for each tile: int32 (1,) of computed tiles, and the number of all."""
        ...

    def choose(self, x: Inputs, data: Any) -> Any:
        """The blocks of keys that each block of queries attends to.

        Args:
            x: The call.
            data: Its operands as the kernel has rounded them, `quantize.Quantized`.

        Returns:
            `block_lists.BlockLists`.
        """
        ...


@dataclass(frozen=True)
class Inputs:
    """The arguments of one attention call.

    Attributes:
        query: (batch, sequence, heads, head_dim).
        key: (batch, key sequence, kv_heads, head_dim); `kv_heads` divides the query's heads.
        value: (batch, key sequence, kv_heads, value_dim).
        attn_mask: Boolean (True takes part) or additive, broadcast to (batch, heads, sequence, key sequence).
        is_causal: Hide later keys; the diagonal starts at the top left.
        scale: Softmax scale of the logits; head_dim ** -0.5 if `None`.
        return_lse: Also return the LSE.
        rotary: A rotary embedding for the kernel to apply to query and key, after the norm. `None` unless the kernel's
            record says `fuses_qk_norm_rope`.
        norm: An RMS norm for the kernel to apply to query and key. `None` unless the kernel's record says
            `fuses_qk_norm_rope`.
        sparse: Chooses the blocks of keys that each block of queries attends to. `None` for all keys, and unless the
            kernel's record says `sparse`.
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
    sparse: BlockChoice | None = None

    @property
    def grouped(self) -> bool:
        """Whether key and value have fewer heads than the query."""
        return self.query.shape[2] != self.key.shape[2]

    @property
    def softmax_scale(self) -> float:
        """The scale of the logits: `scale`, or head_dim ** -0.5."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as (batch, heads, sequence, head_dim)."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)

    def ungrouped(self) -> Inputs:
        """These inputs with key and value heads repeated to the number of query heads."""
        if not self.grouped:
            return self
        groups = self.query.shape[2] // self.key.shape[2]
        key, value = (item.repeat_interleave(groups, dim=2) for item in (self.key, self.value))
        return replace(self, key=key, value=value)


# Returns the output, or (output, LSE) if `return_lse`.
AttentionFunction = Callable[[Inputs], Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The facts of one attention call that decide whether a kernel supports it. A fact of `None` is not checked.

    Attributes:
        dtype: Dtype of query, key and value.
        head_dim: Channels of a head of query and key.
        value_dim: Channels of a head of the value.
        device: Type of the device, as in `torch.device.type`.
        mask: `"none"`, `"keys"` (the same for every query and head: padding) or `"full"`.
        queries: Number of queries.
        keys: Number of keys.
        causal: Whether the call hides later keys; the diagonal starts at the top left.
        square: Whether there are as many queries as keys.
        grouped: Whether key and value have fewer heads than the query.
        lse: Whether the call wants the LSE.
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
        """The facts of a call with these inputs."""
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
    """The kind of a mask: `"none"`, `"keys"` if it broadcasts over heads and queries, or `"full"`. Only the shape is
    read, so the device is not waited for."""
    if attn_mask is None:
        return NO_MASK
    return KEY_MASK if attn_mask.ndim == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1 else FULL_MASK


def key_bias(inputs: Inputs) -> torch.Tensor | None:
    """A `"keys"` mask, boolean or additive, as a bias of the logits: float32 (batch, key sequence). `None` without a
    mask."""
    if inputs.attn_mask is None:
        return None
    rows = inputs.attn_mask[:, 0, 0]
    if rows.dtype == torch.bool:
        rows = torch.zeros(rows.shape, device=rows.device).masked_fill_(~rows, float("-inf"))
    return rows.float().expand(inputs.query.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class SparseSupport:
    """The sparse attention that a kernel can compute.

    Attributes:
        blocks: Supported numbers of tokens of a block.
        centroids: Whether means may stand for blocks that are not kept.
        within_tiles: Whether the kernel can decide for each tile, without lists.
        architectures: CUDA compute capabilities on which it is supported; empty for all of the kernel's.
    """

    blocks: tuple[int, ...] = (32, 64, 128)
    centroids: bool = True
    within_tiles: bool = True
    architectures: tuple[tuple[int, int], ...] = ()

    def refuses(self, device: Device, block: int, centroids: bool, within_tiles: bool) -> str | None:
        """Why the kernel cannot compute sparse attention of that kind, or `None` if it can.

        Args:
            device: The device.
            block: Tokens of a block.
            centroids: Whether means stand for blocks that are not kept.
            within_tiles: Whether the kernel decides for each tile.
        """
        if self.architectures and device.arch not in self.architectures:
            return f"takes no lists of blocks on {device}"
        if within_tiles:
            return None if self.within_tiles else "has no skip-softmax"
        if centroids and not self.centroids:
            return "takes no centroids"
        return None if block in self.blocks else f"takes no blocks of {block} tokens"


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """An attention kernel.

    Args:
        name: The kernel's name in a configuration.
        load: Imports the kernel's package and returns a function of `Inputs`.
        modules: Alternative modules with the kernel; one of them is enough. Empty for torch's own kernels.
        install: The command that installs one of `modules`.
        architectures: Supported CUDA compute capabilities; `None` for any CUDA device; empty for every device.
        at_least: Lowest supported CUDA compute capability; `None` for no bound.
        dtypes: Supported dtypes of query, key and value; empty for all.
        head_dims: Supported head dimensions; `None` for all.
        mask: Whether any attention mask is supported.
        key_mask: Whether a mask that is the same for every query and head (padding) is supported.
        shortest: Least supported number of queries, and of keys.
        key_multiple: Number whose multiples are the supported numbers of keys.
        causal: Whether `is_causal` is supported, with the diagonal starting at the top left as in SDPA.
        causal_square: Whether `is_causal` is supported only for equal lengths, because the kernel's diagonal starts
            elsewhere for others.
        gqa: Whether fewer key and value heads than query heads are supported.
        lse: Whether the kernel can return the LSE.
        exact: Whether the kernel computes in the precision of its inputs, without quantization.
        fuses_qk_norm_rope: Whether the kernel applies the QK-norm and the rotary embedding of its `Inputs`.
        sparse: The kinds of `Inputs.sparse` that the kernel takes; `None` for none.
        auto: Whether `"auto"` may choose the kernel. A user's own function is used by name only.
        refusal: Returns the reason why an installed package cannot be used (e.g. a version with a known error), or
            `None`.
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
    fuses_qk_norm_rope: bool = False
    sparse: SparseSupport | None = None
    auto: bool = True
    refusal: Callable[[], str | None] = lambda: None

    @property
    def on_cuda(self) -> bool:
        """Whether it needs a CUDA device."""
        return self.architectures != () or self.at_least is not None

    @property
    def gpus(self) -> str:
        """The supported devices, for a reader: `"sm_90, sm_100"`, `"sm_80 and later"`, `"any, and CPUs"`."""
        if self.architectures:
            return ", ".join(f"sm_{major}{minor}" for major, minor in self.architectures)
        if self.at_least is not None:
            return f"sm_{self.at_least[0]}{self.at_least[1]} and later"
        return "any" if self.on_cuda else "any, and CPUs"

    @property
    def dims(self) -> str:
        """The supported head dimensions, for a reader: `"8 to 256 by 8"`, `"64, 96, 128, 192, 256"`, `"any"`."""
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
        """Why an installed package does not load (e.g. built for another CUDA or torch), or `None` if it does."""
        if not self.modules:
            return None
        try:
            self.load()
        except Exception as error:  # an import of another package may raise any error
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
    """The recipes of a quantized backend, the default first: the parts of its records' names behind the slash."""
    return tuple(name.partition("/")[2] for name in KERNELS if name.startswith(f"{backend}/"))


def register_attention(name: str, function: Any = None, *, replace: bool = False, **properties: Any) -> Any:
    """Registers a user's attention function under a name that `attention=` accepts. Also usable as a decorator.

    Args:
        name: The name in a configuration.
        function: `fn(query, key, value, attn_mask=None, is_causal=False, scale=None)` on tensors of shape (batch,
            sequence, heads, head_dim), returning the query's shape and dtype. Key and value heads are repeated to the
            query's number of heads before it is called.
        replace: Whether to replace a registered function of that name.
        properties: The limits of the function, as fields of `AttentionKernel` (e.g. `mask=False`,
            `dtypes=(torch.bfloat16,)`). A call beyond them runs on SDPA, with a warning, and is counted for SDPA.

    Raises:
        ValueError: The name is taken, or `properties` has `sparse`.
    """
    if properties.pop("sparse", None):
        raise ValueError(f"register_attention: {name!r}: a registered function is given no blocks. Leave out sparse.")

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
