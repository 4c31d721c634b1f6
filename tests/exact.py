"""Attention, and what comes before it, in float64, written out: what every kernel is compared with."""

from __future__ import annotations

import math

import torch


def attention(query, key, value, mask=None, causal=False, scale=None):
    """Output and logsumexp of softmax attention on (batch, sequence, heads, head_dim), heads grouped or not."""
    groups = query.shape[2] // key.shape[2]
    key, value = (item.repeat_interleave(groups, dim=2) for item in (key, value))
    q, k, v = (item.transpose(1, 2).double() for item in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def normed_rotated(x, weight, eps, angles, rope_style="interleaved"):
    """An RMS norm, over the channels of a head or of all, and a rotation by angles, spelled out in complex numbers."""
    x = x.double()
    if weight is not None:
        dims = (-1,) if weight.numel() == x.shape[-1] else (-2, -1)
        x = x / (x.pow(2).mean(dims, keepdim=True) + eps).sqrt() * weight.double().view(-1, x.shape[-1])
    if angles is None:
        return x
    turn = torch.polar(torch.ones_like(angles.double()), angles.double())
    pairs = torch.stack(x.chunk(2, -1), -1) if rope_style == "half" else x.unflatten(-1, (-1, 2))
    found = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat(found.unbind(-1), -1) if rope_style == "half" else found.flatten(-2)


def cosine(found, expected) -> float:
    return float(torch.nn.functional.cosine_similarity(found.double().flatten(), expected.double().flatten(), 0))


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
