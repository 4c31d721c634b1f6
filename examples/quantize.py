"""Low-bit linear layers on a checkpoint that ships with the package, saved and loaded again: runs on any machine.

python examples/quantize.py
"""

import tempfile
from pathlib import Path

import torch

from diffusers_accel import accelerate, demo, explain, from_pretrained, restore, save_quantized, stats

checkpoint = demo.CHECKPOINTS["flux-shapes"]
pipe = demo.load("flux-shapes")
print(explain(pipe, linear="nvfp4"))


def generate(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(checkpoint.captions[0], generator=generator, output_type="pt", **checkpoint.arguments).images


def decibels(found, expected):
    return -10 * float((found - expected).square().mean().log10())


stock = generate(pipe)
for algo in ("int8", "fp8", "nvfp4", "svdq-nvfp4"):
    accelerate(pipe, linear=algo)
    print(f"{algo}: {decibels(generate(pipe), stock):.1f} dB, {stats(pipe).weight_bytes_after / 2**20:.1f} MiB")

accelerate(pipe, linear="nvfp4")
with tempfile.TemporaryDirectory() as folder:
    save_quantized(pipe, folder)
    size = sum(file.stat().st_size for file in Path(folder, "transformer").iterdir())
    loaded = from_pretrained(folder, dtype=torch.float32)
    same = torch.equal(generate(loaded), generate(pipe))
    print(f"saved: {size / 2**20:.1f} MiB; loaded, it makes the same picture: {same}")
restore(pipe)
print(f"restored, it makes the stock picture: {torch.equal(generate(pipe), stock)}")
