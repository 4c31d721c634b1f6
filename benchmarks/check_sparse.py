"""Checks of sparse attention on a GPU, in the stock Wan pipeline of wan-shapes-long with 4,096 tokens.

Each row is a configuration beside the same one without it: CUDA graphs, streamed weights and both (bit for bit, and
equal shares of blocks by step). Compiled blocks round elsewhere, which the choice of blocks magnifies: a row has the
PSNR of latents after few steps, beside that of the dense kernel, which is compiled too. Lists of all blocks are
compared with dense attention on the same kernel, in clusters too. A choice that serves two steps equals itself under
graphs.

    python benchmarks/check_sparse.py      # check-gpu-sparse.json
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import measure
import torch

sys.path.insert(0, str(Path(__file__).parent / "shapes"))

from long import CALL, load_long

from diffusers_accel import accelerate, restore, stats

# Differences of rounding grow with each step.
STEPS = 4
PROMPT = "a large red circle moving right, on a striped dark background"
RULES: dict[str, dict[str, Any]] = {
    "count": {"keep": 0.34, "block": 64, "order": "cubes", "centroids": True, "dense_steps": 0.25},
    "spread": {"selector": "means", "tau": 0.5, "block": 64, "order": "morton", "centroids": True},
    "mass": {"top_p": 0.5, "block": 32, "dense_until": 0.8},
    "static": {"selector": "radial", "keep": 0.25, "block": 128},
    "bands": {"selector": "bands", "keep": 0.25, "block": 64},
    "refresh": {"tau": 0.5, "block": 64, "order": "cubes", "refresh": 2},
    "clusters": {"keep": 0.25, "block": 64, "order": "clusters", "centroids": True, "dense_steps": 0.25},
    "clusters, refresh": {"keep": 0.25, "block": 32, "order": "clusters", "centroids": True, "refresh": 2},
}
# Name -> settings beside the rule's, and whether the result is the same bit for bit.
BESIDE: dict[str, tuple[dict[str, Any], bool]] = {
    "graphs": ({"cuda_graph": True}, True),
    "graphs, offload": ({"cuda_graph": True, "offload": {"level": 3}}, True),
    "compiled, graphs": ({"compile": True, "cuda_graph": True}, False),
}
# Decibels that a compiled sparse row may be below the compiled dense one.
BELOW = 15.0


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * float((found - expected).square().mean().log10()) if (found != expected).any() else float("inf")


def check() -> tuple[dict[str, Any], list[str]]:
    """The figures of each row, and what is wrong."""
    pipe = load_long(torch.bfloat16, "cuda")

    def run() -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        arguments = {**CALL, "num_inference_steps": STEPS}
        return pipe(PROMPT, generator=generator, output_type="latent", **arguments).frames.float().cpu()

    found: dict[str, Any] = {}
    wrong: list[str] = []

    def note(name: str, figures: dict[str, Any], good: bool) -> None:
        found[name] = figures
        print(name, figures, flush=True)
        if not good:
            wrong.append(f"{name}: {figures}")

    stock = run()
    for backend in ("triton", "sage-fp8"):
        attention = {"backend": backend, "cross_attention": "sdpa"}
        accelerate(pipe, attention=attention)
        dense = run()
        accelerate(pipe, attention=attention, compile=True)
        compiled = psnr(run(), dense)
        note(f"{backend}, dense, compiled", {"psnr": compiled}, compiled > 15)
        for order in ("model", "clusters"):
            whole = {"selector": "means", "tau": -10.0, "block": 64, "min_tokens": 1, "centroids": True, "order": order}
            accelerate(pipe, attention={**attention, "sparse": whole})
            same = psnr(run(), dense)
            figures = {"psnr": same, "shares": stats(pipe).sparse_by_step}
            # Sums in another order are as far from each other as a compiler's.
            note(f"{backend}, all blocks, {order}", figures, same > compiled - 3)
        for rule, sparse in RULES.items():
            settings = {"attention": {**attention, "sparse": {**sparse, "min_tokens": 1}}}
            accelerate(pipe, **settings)
            expected, shares = run(), stats(pipe).sparse_by_step
            note(f"{backend}, {rule}", {"psnr against dense": psnr(expected, dense), "shares": shares}, bool(shares))
            for name, (beside, exact) in BESIDE.items():
                # Kernels differ in nothing that offload sees, and rules in little that a compiler does.
                if name != "graphs" and (backend != "triton" or rule not in ("count", "clusters", "clusters, refresh")):
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    accelerate(pipe, **settings, **beside)
                results = [run(), run()]
                figures = {
                    "psnr": [psnr(each, expected) for each in results], "shares": stats(pipe).sparse_by_step,
                    "replays": stats(pipe).graph_replays,
                }  # fmt: skip
                equal = all(abs(figures["shares"].get(step, -1) - share) < 1e-3 for step, share in shares.items())
                replayed = "graphs" not in name or figures["replays"] > 0
                least = float("inf") if exact else compiled - BELOW
                good = min(figures["psnr"]) >= least and (equal or not exact) and replayed
                note(f"{backend}, {rule}, {name}", figures, good)
    restore(pipe)
    same = psnr(run(), stock)
    note("restored", {"psnr": same}, same == float("inf"))
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    found, wrong = check()
    print(measure.write("check-gpu-sparse", {"rows": found, "wrong": wrong}, options.out))
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
