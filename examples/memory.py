"""FLUX.1-dev or Wan2.1 14B on a card of 12 GB: weights are copied from host memory while earlier blocks compute.

The pipeline is loaded to the host, which needs memory for all its weights (34 or 40 GB in bf16), and stays there:
`accelerate` moves to the GPU what the budget has room for.

    python examples/memory.py flux
    python examples/memory.py wan --budget 11GiB --prompt "a red fox running through the snow"
"""

import argparse

import torch
from diffusers import FluxPipeline, WanPipeline
from diffusers.utils import export_to_video

from diffusers_accel import accelerate, explain, stats

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", choices=["flux", "wan"])
parser.add_argument("--budget", default="11GiB", help="the most GPU memory that the pipeline may use")
parser.add_argument("--prompt", default="a red fox in the snow")
options = parser.parse_args()

# The plan reserves activations for the largest request of `warmup`.
sections = {"offload": options.budget}
if options.model == "flux":
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    sections |= {"warmup": {"resolutions": ["1024x1024"]}}
    arguments = {"height": 1024, "width": 1024, "num_inference_steps": 28}
else:
    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", dtype=torch.bfloat16)
    # A call takes seconds, of which CUDA graphs save none; their memory holds blocks.
    sections |= {"cuda_graph": None, "warmup": {"resolutions": ["480x832"], "num_frames": [81]}}
    arguments = {"height": 480, "width": 832, "num_frames": 81}

print(explain(pipe, "lossless", **sections))
accelerate(pipe, "lossless", **sections)
result = pipe(options.prompt, generator=torch.Generator().manual_seed(0), **arguments)
if options.model == "flux":
    result.images[0].save("fox.png")
else:
    export_to_video(result.frames[0], "fox.mp4", fps=16)
print(stats(pipe))
