"""The layers around modules that look beyond a strip: each gets the values that the strip does not hold.

Outside `Strips.sharding`, that is when a part of the VAE is called by itself, they run the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .kinds import Halo
from .strips import Strips


def convolution(
    strips: Strips,
    conv: Any,
    halo: Halo,
    inner: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The layer around the method that a convolution calls once its input is joined with cached frames and padded
    (`CONV_FORWARD`).

    Args:
        strips: The strips.
        conv: The convolution.
        halo: Its halo.
        inner: The stock method.
        x: This rank's strip, with room for the halo if `halo.ahead`.
        weight: The convolution's weight.
        bias: The convolution's bias; `None` without one.
    """
    if not strips.sharded:
        return inner(x, weight, bias)
    axis = strips.axis
    if halo.ahead:
        length = x.shape[axis] - halo.before - halo.after
        before, after = strips.exchange_halos(x.narrow(axis, halo.before, length), halo)
        # Stock code has just made this tensor, padded with zeros, so it may be written to.
        x.narrow(axis, 0, halo.before).copy_(before)
        x.narrow(axis, halo.before + length, halo.after).copy_(after)
        return inner(x, weight, bias)
    zeros = conv.padding_mode == "zeros"
    before, after = strips.exchange_halos(x, halo, zeros)
    x = torch.cat([before, x, after], axis)
    padding = list(conv.padding)
    padding[axis] = 0
    if not zeros:
        # After the halo: a strip of one row is reflected by its neighbour's rows.
        sides = [(size, size) for size in padding]
        sides[axis] = (halo.before * strips.first, halo.after * strips.last)
        x = F.pad(x, [size for pair in reversed(sides) for size in pair], conv.padding_mode)
        padding = [0] * len(padding)
    convolve: Any = F.conv2d if len(padding) == 2 else F.conv3d
    return convolve(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def group_norm(strips: Strips, norm: Any, inner: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The layer around a group norm: mean and variance of all strips, merged."""
    if not strips.sharded:
        return inner(x)
    batch, channels = x.shape[:2]
    values = x.reshape(batch, norm.num_groups, -1)
    variance, mean = torch.var_mean(values.to(torch.promote_types(x.dtype, torch.float32)), -1, correction=0)
    found = torch.cat(strips.group.all_gather(torch.stack([mean, variance])[None], 0, transient=True))
    means, variances = found.unbind(1)
    mean = (strips.weights * means).sum(0)
    variance = (strips.weights * (variances + (means - mean).square())).sum(0)
    # Statistics of each channel: a batch norm with given statistics is this arithmetic in one kernel.
    mean, variance = (item.repeat_interleave(channels // norm.num_groups, 1).flatten() for item in (mean, variance))
    weight, bias = (None if item is None else item.to(mean.dtype).repeat(batch) for item in (norm.weight, norm.bias))
    return F.batch_norm(x.reshape(1, batch * channels, -1), mean, variance, weight, bias, eps=norm.eps).view(x.shape)


def attention(strips: Strips, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer around attention over the picture: this rank's queries, all ranks' keys and values."""
    if not strips.sharded:
        return inner(*args, **kwargs)
    with _AllGatherKeys(strips) as keys:
        result = inner(*args, **kwargs)
    assert keys.calls, "attention did not call scaled_dot_product_attention, so it had this rank's keys only"
    return result


class _AllGatherKeys(TorchFunctionMode):
    """A mode in which `scaled_dot_product_attention` attends to the keys of all ranks, in the order of ranks.

    There is no mask, so the order does not matter.
    """

    def __init__(self, strips: Strips):
        super().__init__()
        self.strips, self.calls = strips, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            assert not rest and kwargs.get("attn_mask") is None
            args = (query, *self.strips.whole(torch.stack([key, value]), -2))
            self.calls += 1
        return func(*args, **kwargs)
