"""Linear layers of other packages: torchao's and Transformer Engine's, as records of `LINEARS`.

A name of torchao's is its configuration class in snake case: `"torchao:int8_weight_only"` is `Int8WeightOnlyConfig`.
The suffix `/row` asks for scales per row. Transformer Engine's layers hold an FP8 weight with current scaling:
`"te-fp8-per-tensor"` has one scale, `"te-fp8-blockwise"` one per block of 128 x 128.

Both packages are imported by loaders only. Their layers are not `LinearProxy`s, so each keeps its stock layer under
`module.STOCK`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.platform import device_guard, has_module
from ...errors import Unsupported, nearest
from .record import LINEARS, LinearKernel, Replace

_PREFIX = "torchao:"


def _torchao(name: str) -> LinearKernel:
    """The record for a name of torchao's.

    Raises:
        Unsupported: torchao is installed and has no such configuration.
    """
    wanted, _, granularity = name.removeprefix(_PREFIX).partition("/")
    if has_module("torchao"):
        _torchao_config(name, wanted, granularity)
    return LinearKernel(
        name=name,
        load=lambda: _replace(name, _torchao_config(name, wanted, granularity)),
        modules=("torchao",),
        install="pip install torchao",
        everywhere=False,
        foreign=True,
    )


def _torchao_config(name: str, wanted: str, granularity: str) -> Any:
    import torchao.quantization as quantization

    known = {_snake_case(name): name for name in dir(quantization) if name.endswith("Config")}
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
        raise Unsupported(
            f"linear={name!r}", f"torchao refuses its arguments: {error}.", f"another of {', '.join(known)}."
        ) from error


def _snake_case(kind: str) -> str:
    """`Int8WeightOnlyConfig` -> `int8_weight_only`."""
    name = kind.removesuffix("Config")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _replace(name: str, config: Any) -> Replace:
    from torchao.quantization import quantize_

    def replace(linear: nn.Linear) -> nn.Module:
        # torchao quantizes a model in place: the model here is a shell around the stock weight.
        shell = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        shell.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        shell.bias = linear.bias
        holder = nn.Sequential(shell)
        quantize_(holder, config)
        made = holder[0]
        if type(made.weight.data) is torch.Tensor:
            raise Unsupported(
                f"linear={name!r}",
                f"torchao does not quantize a layer of {linear.in_features} input and {linear.out_features} output "
                "features.",
                "linear.ignore with a glob for such layers.",
            )
        made.kind = name  # type: ignore[assignment]
        return made

    return replace


LINEARS.add_family(_PREFIX, _torchao)


def _transformer_engine(recipe: str) -> Replace:
    """The function that makes Transformer Engine's layers.

    Args:
        recipe: Name of a class in `transformer_engine.common.recipe`.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    # Transformer Engine 2.9 renamed both functions and the argument; the old names still work.
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    model_init = getattr(te, "quantized_model_init", None) or te.fp8_model_init
    chosen = getattr(recipes, recipe)()
    option = "recipe" if hasattr(te, "autocast") else "fp8_recipe"

    class TransformerEngineLinear(te.Linear):  # type: ignore[misc, name-defined]
        """Transformer Engine's layer, with its forward always under its recipe."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with device_guard(x), autocast(enabled=True, **{option: chosen}):
                out: torch.Tensor = super().forward(x)
            return out

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
