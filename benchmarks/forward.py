"""One eager forward of a model at its real shape, random weights, with each attention kernel, against stock.

Random weights cost what trained ones cost, so this measures speed only. Variants are called in turn over several
rounds. `fa3-fp8, stock rotation` leaves QK-norm and rotary embedding to the stock functions, which `fa3-fp8` otherwise
does in passing. The last variant is the configuration that lets `"auto"` choose among 8-bit kernels too.

    python benchmarks/forward.py wan
    python benchmarks/forward.py cosmos
    python benchmarks/forward.py ltx2 --layers 12
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from denoisers import MODELS, build, inputs

from diffusers_accel import Unsupported, accelerate, restore, stats
from diffusers_accel.kernels.attention import KERNELS

VARIANTS: dict[str, Any] = {
    "stock": None,
    "sdpa": "sdpa",
    "auto, exact": "auto",
    "fa3": "fa3",
    "fa3-fp8": "fa3-fp8",
    "fa3-fp8, stock rotation": "fa3-fp8-unfolded",
    "fa3-fp8, cross-attention sdpa": {"backend": "fa3-fp8", "cross_attention": "sdpa"},
    "sage": "sage",
    "sage-fp8": "sage-fp8",
    "qk16pv8": "qk16pv8",
    "auto, 8-bit": {"backend": "auto", "fidelity": "8bit"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    model = MODELS[options.model]
    layers = options.layers or model.config["num_layers"]
    unfolded = replace(KERNELS.get("fa3-fp8"), name="fa3-fp8-unfolded", fuses_qk_norm_rope=False, auto=False)
    KERNELS.add("fa3-fp8-unfolded", unfolded)
    pipe = build(model, layers)
    arguments = inputs(model)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return pipe.transformer(**arguments, return_dict=False)[0]

    expected = forward().float()
    found: dict[str, Any] = {name: {"all": []} for name in VARIANTS}
    for _ in range(options.rounds):
        for name, section in VARIANTS.items():
            if "refused" in found[name]:
                continue
            if section is not None:
                try:
                    accelerate(pipe, attention=section)
                except Unsupported as error:
                    found[name] = {"refused": str(error)}
                    continue
            found[name]["all"] += measure.seconds(forward, 2)
            if section is not None:
                out = forward().float()
                found[name]["relative error"] = float((out - expected).norm() / expected.norm())
                statistics = stats(pipe)
                found[name]["kernels"] = statistics.attention_kernels
                if statistics.attention_timings:
                    found[name]["timings"] = statistics.attention_timings
                restore(pipe)
    result = {
        name: {**figure, **measure.summary(figure["all"])} if figure.get("all") else figure
        for name, figure in found.items()
    }
    stock = result["stock"]["seconds"]
    for figure in result.values():
        if "seconds" in figure:
            figure["speed-up over stock"] = round(stock / figure["seconds"], 3)
    for name, figure in result.items():
        print(name, {key: value for key, value in figure.items() if key not in ("all", "timings")}, flush=True)
    work = f"{model.work}, {layers} of {model.config['num_layers']} layers, bf16, one eager forward"
    print(measure.write(f"forward-{options.model}", {"work": work, "variants": result}, options.out))


if __name__ == "__main__":
    main()
