"""Tiny pipelines whose denoisers have other numbers of attention heads, for what divides them among ranks."""

from __future__ import annotations

from typing import Any

import torch

from . import TINY
from .components import energise


def _inner(config: dict[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


# What else of a denoiser's configuration follows from its heads. Cosmos 3 has half as many key heads.
_FOLLOWS = {
    "SD3Transformer2DModel": lambda config: {"caption_projection_dim": _inner(config)},
    "LTX2VideoTransformer3DModel": lambda config: {
        "cross_attention_dim": _inner(config),
        "audio_num_attention_heads": config["num_attention_heads"],
        "audio_cross_attention_dim": config["num_attention_heads"] * config["audio_attention_head_dim"],
    },
    # Channels of the picture it is given, which it embeds as wide as itself.
    "WanTransformer3DModel": lambda config: {"added_kv_proj_dim": config["added_kv_proj_dim"] and _inner(config)},
    "Cosmos3OmniTransformer": lambda config: {"num_key_value_heads": config["num_attention_heads"] // 2},
}


def with_heads(name: str, heads: int | None, **options: Any) -> Any:
    """The pipeline `name`, its denoisers with so many heads, and other options of their class."""
    entry = TINY[name]
    pipe = entry.build()
    if heads is None and not options:
        return pipe
    for denoiser in entry.denoisers:
        stock = getattr(pipe, denoiser)
        kind = type(stock).__name__
        config = {**stock.config, **({"num_attention_heads": heads} if heads else {})}
        config.pop("_use_default_values", None)  # what is in it would not be taken from here
        config |= {**(_FOLLOWS[kind](config) if heads and kind in _FOLLOWS else {}), **options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = energise(type(stock).from_config(config), skip=("pos_embed.pos_embed",) if "SD3" in kind else ())
        setattr(pipe, denoiser, made.eval().requires_grad_(False))
    return pipe
