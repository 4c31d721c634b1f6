"""A user's own attention function, on a checkpoint that ships with the package: runs on any machine.

python examples/own_attention.py
"""

import torch

from diffusers_accel import accelerate, demo, register_attention, stats


@register_attention("explicit")
def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
    """Softmax attention written out; (batch, sequence, heads, head_dim) in and out."""
    query, key, value = (item.transpose(1, 2) for item in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if allowed else scores + attn_mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


pipe = demo.load("flux-shapes")
accelerate(pipe, attention="explicit")
image = pipe("a large red circle in the center, on a plain light background", **demo.call_arguments("flux-shapes"))
image.images[0].save("circle.png")
print(stats(pipe))
