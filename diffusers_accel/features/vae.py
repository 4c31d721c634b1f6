"""The VAE: its stock switches (tiling, slicing), and its decoder compiled. Its code stays diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..compat.torch_private import recompile_limit_at_least
from ..config import VAEConfig
from ..core.edits import AddLayer, Edit, SetAttr
from ..errors import Unsupported
from .context import PipelineContext
from .feature import Plan

_SWITCHES = {"tiling": "use_tiling", "slicing": "use_slicing"}


def check(context: PipelineContext, config: VAEConfig) -> Plan:
    """The switches to set, and the decoder's compilation.

    Raises:
        Unsupported: The pipeline has no VAE, or its VAE lacks the switch or a decoder.
    """
    vae = getattr(context.pipe, "vae", None)
    if vae is None:
        raise Unsupported("vae", "the pipeline has no VAE.", "vae=None.", type(context.pipe).__name__)
    actions = []
    for name, attribute in _SWITCHES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not hasattr(vae, attribute):
            raise Unsupported(f"vae.{name}", "it has no such switch.", f"vae.{name}=None.", type(vae).__name__)
        actions.append(f"{name} {'on' if value else 'off'}")
    if config.compile:
        if not isinstance(getattr(vae, "decoder", None), torch.nn.Module):
            raise Unsupported("vae.compile", "it has no decoder module.", "vae.compile=False.", type(vae).__name__)
        actions.append("decoder compiled")
    return Plan(", ".join(actions) or "nothing", int(bool(actions)))


def components(context: PipelineContext, config: VAEConfig) -> tuple[str, ...]:
    """Names of the changed components besides the denoisers."""
    return ("vae",)


def edits(context: PipelineContext, config: VAEConfig) -> Iterator[Edit]:
    """The configured switches, and one layer around the decoder."""
    if "vae" in context.shared:
        return
    vae = context.pipe.vae
    for name, attribute in _SWITCHES.items():
        value = getattr(config, name)
        if value is not None:
            switch = SetAttr(vae, attribute, value)
            yield switch
            for method in (f"enable_{name}", f"disable_{name}"):
                if hasattr(vae, method):
                    yield AddLayer(vae, context.rank("vae"), _user_switch(switch), method)
    if config.compile:
        yield AddLayer(vae.decoder, context.rank("vae"), _compiled())


def _user_switch(switch: SetAttr) -> Callable[..., Any]:
    """A layer around a VAE's `enable_*` or `disable_*` method. After its user calls it, `restore` keeps the user's
    value."""

    def switched(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        switch.set_by_user = True
        return inner(*args, **kwargs)

    return switched


def _compiled() -> Callable[..., Any]:
    """A layer that compiles the decoder. Graph breaks are allowed: video decoders keep features of earlier chunks in
    Python lists."""
    functions: list[Callable[..., Any]] = []

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not functions:
            functions.append(torch.compile(inner))
        # A video's chunks differ in the features that they are given; Dynamo would give up after eight graphs.
        with recompile_limit_at_least():
            return functions[0](*args, **kwargs)

    return forward
