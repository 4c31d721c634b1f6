"""Other packages' linear layers, where a user has them: `"torchao:<config>"` and Transformer Engine's.

torchao's configurations are named as its classes are, in small letters: `"torchao:int8_weight_only"` is
`Int8WeightOnlyConfig`; `/row` behind one that has a granularity asks for scales per row. Transformer Engine's layers
hold their weight in FP8 with current scales: `"te-fp8-per-tensor"`, and 128 x 128 blocks of them: `"te-fp8-blockwise"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.platform import has_module, on
from ...errors import Unsupported, nearest
from .record import LINEARS, LinearKernel, Replace

_PREFIX = "torchao:"


def _torchao(name: str) -> LinearKernel:
    """The record behind a name of torchao's; whether there is such a configuration is seen when it is loaded."""
    wanted, _, granularity = name.removeprefix(_PREFIX).partition("/")
    if has_module("torchao"):
        _config(name, wanted, granularity)
    return LinearKernel(
        name=name,
        load=lambda: _replace(name, _config(name, wanted, granularity)),
        modules=("torchao",),
        install="pip install torchao",
        everywhere=False,
    )


def _config(name: str, wanted: str, granularity: str) -> Any:
    import torchao.quantization as quantization

    known = {_small(kind): kind for kind in dir(quantization) if kind.endswith("Config")}
    if wanted not in known or granularity not in ("", "row"):
        raise Unsupported(
            f"linear={name!r}",
            "torchao has no such configuration for linear layers."
            if granularity in ("", "row")
            else f"a granularity is 'row' or nothing, not {granularity!r}.",
            nearest(wanted, known),
        )
    arguments = {"granularity": quantization.PerRow()} if granularity else {}
    try:
        return getattr(quantization, known[wanted])(**arguments)
    except TypeError as error:
        raise Unsupported(f"linear={name!r}", f"torchao says: {error}.", f"another of {', '.join(known)}.") from error


def _small(kind: str) -> str:
    """`Int8WeightOnlyConfig` -> `int8_weight_only`."""
    name = kind.removesuffix("Config")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _replace(name: str, config: Any) -> Replace:
    from torchao.quantization import quantize_

    def replace(linear: nn.Linear) -> nn.Module:
        # torchao works on a model, in place: a shell with the same weight stands in for one.
        shell = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        shell.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        shell.bias = linear.bias
        holder = nn.Sequential(shell)
        quantize_(holder, config)
        made = holder[0]
        if type(made.weight.data) is torch.Tensor:
            raise Unsupported(
                f"linear={name!r}",
                f"torchao leaves a layer of {linear.in_features} to {linear.out_features} features as it is.",
                "linear.ignore for such layers.",
            )
        made.kind = name  # type: ignore[assignment]
        return made

    return replace


LINEARS.add_family(_PREFIX, _torchao)


def _transformer_engine(recipe: str) -> Replace:
    """A loader of Transformer Engine's layers under one of its recipes."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    # Both names were changed in 2.9; the old ones go on for a while.
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    model_init = getattr(te, "quantized_model_init", None) or te.fp8_model_init
    chosen = getattr(recipes, recipe)()
    # The argument's name was changed too.
    option = "recipe" if hasattr(te, "autocast") else "fp8_recipe"

    class TransformerEngineLinear(te.Linear):  # type: ignore[misc, name-defined]
        """Transformer Engine's layer, under its recipe whoever calls it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with on(x), autocast(enabled=True, **{option: chosen}):
                found: torch.Tensor = super().forward(x)
            return found

    def replace(linear: nn.Linear) -> nn.Module:
        with model_init(enabled=True, recipe=chosen), torch.no_grad():
            made = TransformerEngineLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                params_dtype=linear.weight.dtype,
                device=linear.weight.device,
            )
            made.weight.copy_(linear.weight)
            if linear.bias is not None:
                made.bias.copy_(linear.bias)
        made.kind = _TE_NAMES[recipe]
        return made.eval()

    return replace


_TE_NAMES = {"Float8CurrentScaling": "te-fp8-per-tensor", "Float8BlockScaling": "te-fp8-blockwise"}
for _recipe, _name in _TE_NAMES.items():
    LINEARS.add(
        _name,
        LinearKernel(
            name=_name,
            load=lambda recipe=_recipe: _transformer_engine(recipe),  # type: ignore[misc]
            modules=("transformer_engine.pytorch",),
            install="pip install 'transformer-engine[pytorch]'",
            everywhere=False,
            at_least=(8, 9) if _recipe == "Float8CurrentScaling" else (9, 0),
            in_multiple=16,
            out_multiple=16,
            bits=8.0,
        ),
    )
