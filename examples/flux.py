"""FLUX.1-dev with everything lossless, then with step caching: the same prompt and seed, and what each cost.

python examples/flux.py "a photo of a red fox in the snow"
"""

import sys
import time

import torch
from diffusers import FluxPipeline

from diffusers_accel import accelerate, explain, restore, stats

prompt = sys.argv[1] if len(sys.argv) > 1 else "a photo of a red fox in the snow"
pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
print(explain(pipe, "balanced"))

for preset in ("lossless", "balanced"):
    accelerate(pipe, preset)
    for attempt in ("with compilation", "again"):
        start = time.perf_counter()
        image = pipe(prompt, num_inference_steps=28, generator=torch.Generator("cuda").manual_seed(0)).images[0]
        print(f"{preset}, {attempt}: {time.perf_counter() - start:.2f} s")
    image.save(f"{preset}.png")
    print(stats(pipe))
restore(pipe)
