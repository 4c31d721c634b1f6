"""What an attention kernel is: a frozen record with a lazy loader and a sentence for every reason it cannot run.

Layout contract: query, key, value are (batch, sequence, heads, head_dim), the output has the query's shape (with the
value's head_dim). An LSE, where a kernel has one, is float32 (batch, heads, sequence), natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...core.platform import Device, has_module
from ...core.registry import Registry

AttentionFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """An attention kernel.

    Args:
        name: As a user writes it.
        load: Imports what is needed and returns `fn(query, key, value, attn_mask, is_causal, scale, enable_gqa)`.
        modules: Alternative modules it comes from; any one of them is enough. Empty for torch's own.
        install: How to get them.
        architectures: CUDA compute capabilities it runs on; `None` for any CUDA device; empty for every device.
        dtypes: Input types it takes; empty for all.
        head_dims: Head dimensions it takes; `None` for all.
        mask: Whether it takes an attention mask.
        causal: Whether it takes `is_causal`, whose diagonal starts at the top left, as SDPA's does.
        causal_square: Whether it takes `is_causal` only for equal lengths (elsewhere its diagonal lies otherwise).
        gqa: Whether it takes fewer key and value heads than query heads.
        exact: Whether it computes in the input's own precision (no quantization).
    """

    name: str
    load: Callable[[], AttentionFunction]
    modules: tuple[str, ...] = ()
    install: str = ""
    architectures: tuple[tuple[int, int], ...] | None = ()
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: tuple[int, ...] | None = None
    mask: bool = True
    causal: bool = True
    causal_square: bool = False
    gqa: bool = True
    exact: bool = True

    def missing(self, device: Device) -> str | None:
        """Why the kernel cannot run on `device`, or `None` if it can."""
        if self.modules and not any(has_module(name) for name in self.modules):
            return f"needs the package {' or '.join(self.modules)} ({self.install})."
        if self.architectures == ():
            return None
        if device.type != "cuda":
            return f"needs a CUDA device; this is {device}."
        if self.architectures is not None and device.arch not in self.architectures:
            wanted = ", ".join(f"sm_{major}{minor}" for major, minor in self.architectures)
            return f"is built for {wanted}; this is {device}."
        return self._broken()

    def _broken(self) -> str | None:
        """Why an installed package does not load (built for another CUDA or torch, say), or `None` if it does."""
        if not self.modules:
            return None
        try:
            self.load()
        except Exception as error:  # whatever a foreign package raises while it is imported
            return f"is installed and does not load: {type(error).__name__}: {error}."
        return None

    def refuses(
        self,
        dtype: torch.dtype | None = None,
        head_dim: int | None = None,
        device: torch.device | None = None,
        masked: bool = False,
        causal: bool = False,
        grouped: bool = False,
        square: bool = True,
    ) -> str | None:
        """Why the kernel cannot take such a call, or `None` if it can. What is not given is not judged."""
        if device is not None and self.architectures != () and device.type != "cuda":
            return f"runs on CUDA, and the call is on {device.type}"
        if dtype is not None and self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(str(item) for item in self.dtypes)}, not {dtype}"
        if head_dim is not None and self.head_dims is not None and head_dim not in self.head_dims:
            return f"takes head_dim {', '.join(map(str, self.head_dims))}, not {head_dim}"
        if masked and not self.mask:
            return "takes no attention mask"
        if causal and not self.causal:
            return "takes no causal mask"
        if causal and self.causal_square and not square:
            return "takes a causal mask for equal lengths only"
        if grouped and not self.gqa:
            return "takes no grouped key and value heads"
        return None


KERNELS: Registry[AttentionKernel] = Registry("attention kernel")


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

    def register(function: AttentionFunction) -> AttentionFunction:
        def adapted(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None,
            is_causal: bool,
            scale: float | None,
            enable_gqa: bool,
        ) -> torch.Tensor:
            if enable_gqa:
                groups = query.shape[2] // key.shape[2]
                key, value = (item.repeat_interleave(groups, dim=2) for item in (key, value))
            out = function(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
            expected = (*query.shape[:3], value.shape[3])
            if not isinstance(out, torch.Tensor) or tuple(out.shape) != expected or out.dtype != query.dtype:
                got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
                raise ValueError(
                    f"The attention function registered as {name!r} returned {got}; it must return {expected} "
                    f"{query.dtype}, which is (batch, sequence, heads, head_dim) as it was given."
                )
            return out

        KERNELS.add(name, AttentionKernel(name=name, load=lambda: adapted, **properties), replace=replace)
        return function

    return register if function is None else register(function)
