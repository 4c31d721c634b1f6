"""Denoisers at their published checkpoints' real shapes, with random weights: no cost depends on their values.

Each is put into a stock pipeline whose other components are absent, as `accelerate` wants one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from flux import TRANSFORMER


@dataclass(frozen=True)
class Model:
    """A model's shape.

    Attributes:
        denoiser: Name of its class.
        pipeline: Name of its pipeline's class; components that a forward does not need are `None`.
        config: Of the published checkpoint.
        inputs: Makes the arguments of one call from a function that makes random tensors.
        work: What one call is, in words.
    """

    denoiser: str
    pipeline: str
    config: dict[str, Any]
    inputs: Callable[[Any], dict[str, Any]]
    work: str


def _wan(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 16, 21, 60, 104),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": random(1, 512, 4096),
    }


def _cosmos(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 16, 21, 60, 104),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": random(1, 512, 1024),
        "fps": 16,
    }


def _wan_5b(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 48, 31, 44, 80),
        "timestep": torch.full((1, 31 * 22 * 40), 500.0, device="cuda"),
        "encoder_hidden_states": random(1, 512, 4096),
    }


def _flux(side: int) -> Callable[[Any], dict[str, Any]]:
    def inputs(random: Any) -> dict[str, Any]:
        rows = torch.arange(side // 16, device="cuda")
        ids = torch.stack(torch.meshgrid(rows * 0, rows, rows, indexing="ij"), -1)[0].reshape(-1, 3).to(torch.bfloat16)
        return {
            "hidden_states": random(1, (side // 16) ** 2, 64),
            "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
            "guidance": torch.tensor([3.5], device="cuda"),
            "pooled_projections": random(1, 768),
            "encoder_hidden_states": random(1, 512, 4096),
            "txt_ids": torch.zeros(512, 3, device="cuda", dtype=torch.bfloat16),
            "img_ids": ids,
        }

    return inputs


def _qwen(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 83 * 83, 64),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": random(1, 512, 3584),
        "img_shapes": [[(1, 83, 83)]],
    }


def _ltx2(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(2, 16 * 16 * 24, 128),
        "audio_hidden_states": random(2, 126, 128),
        "encoder_hidden_states": random(2, 1024, 3840),
        "audio_encoder_hidden_states": random(2, 1024, 3840),
        "encoder_attention_mask": torch.ones(2, 1024, device="cuda", dtype=torch.bfloat16),
        "audio_encoder_attention_mask": torch.ones(2, 1024, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((2,), 500.0, device="cuda"),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "audio_num_frames": 126,
    }


MODELS = {
    "wan": Model(
        "WanTransformer3DModel",
        "WanPipeline",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        },
        _wan,
        "Wan2.1 1.3B shape, 480x832, 81 frames, batch 1",
    ),
    "wan-14b": Model(
        "WanTransformer3DModel",
        "WanPipeline",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 13824,
            "num_layers": 40,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        },
        _wan,
        "Wan2.1 14B shape, 480x832, 81 frames, batch 1",
    ),
    "wan-5b": Model(
        "WanTransformer3DModel",
        "WanPipeline",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 48,
            "out_channels": 48,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 14336,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        },
        _wan_5b,
        "Wan2.2 TI2V 5B shape, 704x1280, 121 frames, batch 1",
    ),
    "flux": Model(
        "FluxTransformer2DModel", "FluxPipeline", TRANSFORMER, _flux(1024), "FLUX.1-dev shape, 1024x1024, batch 1"
    ),
    "flux-512": Model(
        "FluxTransformer2DModel", "FluxPipeline", TRANSFORMER, _flux(512), "FLUX.1-dev shape, 512x512, batch 1"
    ),
    "qwen": Model(
        "QwenImageTransformer2DModel",
        "QwenImagePipeline",
        {"num_layers": 60, "in_channels": 64, "out_channels": 16},
        _qwen,
        "Qwen-Image shape, 1328x1328, batch 1",
    ),
    "cosmos": Model(
        "CosmosTransformer3DModel",
        "Cosmos2TextToImagePipeline",
        {
            "num_attention_heads": 16,
            "num_layers": 28,
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,  # one more input channel, for which torchvision would be needed
        },
        _cosmos,
        "Cosmos-Predict2 2B shape, 480x832, 81 frames, batch 1",
    ),
    "ltx2": Model(
        "LTX2VideoTransformer3DModel",
        "LTX2Pipeline",
        {"num_layers": 48, "rope_type": "split"},
        _ltx2,
        "LTX-2 19B shape, 512x768, 121 frames with audio, batch 2 (guidance)",
    ),
}


def build(model: Model, layers: int | None = None) -> Any:
    """A stock pipeline that has the denoiser, with random bf16 weights on the GPU, and a scheduler; nothing else."""
    torch.manual_seed(0)
    changed = {"num_layers": layers} if layers else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            denoiser = getattr(diffusers, model.denoiser)(**{**model.config, **changed})
    finally:
        torch.set_default_dtype(default)
    return pipeline(model, denoiser)


def build_on_host(model: Model, layers: int | None = None) -> Any:
    """The same, with weights in the host's memory, where random numbers for all would take minutes."""
    changed = {"num_layers": layers} if layers else {}
    return pipeline(model, on_host(lambda: getattr(diffusers, model.denoiser)(**{**model.config, **changed})))


def on_host(make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model whose weights repeat some random numbers, in the host's memory."""
    from accelerate import init_empty_weights

    generator = torch.Generator().manual_seed(0)
    with init_empty_weights():  # buffers are computed, since a model keeps tables there
        model = make()
    some = (torch.randn(2**24, generator=generator) * 0.02).to(dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            count = parameter.numel()
            weight = torch.empty(count, dtype=dtype)
            for first in range(0, count, len(some)):
                part = weight[first : first + len(some)]
                part.copy_(some[: len(part)])
            if parameter.ndim == 1 and name == "weight":
                weight.add_(1)
            module.register_parameter(name, torch.nn.Parameter(weight.view(parameter.shape), requires_grad=False))
    if hasattr(model, "tie_weights"):  # a text encoder's embedding table is in two places
        model.tie_weights()
    return model.eval()


def pipeline(model: Model, denoiser: Any) -> Any:
    """A stock pipeline that has a denoiser and a scheduler; nothing else."""
    kind = getattr(diffusers, model.pipeline)
    pipe = kind.__new__(kind)  # its other components are not needed, and their constructors want them
    diffusers.DiffusionPipeline.__init__(pipe)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    components = dict.fromkeys(kind._get_signature_keys(kind)[0])
    pipe.register_modules(**components | {"transformer": denoiser.eval().requires_grad_(False), "scheduler": scheduler})
    return pipe


def inputs(model: Model, pipe: Any = None) -> dict[str, Any]:
    """Arguments of one forward; of a pipeline, that of the middle one of 28 steps, which its scheduler is set to: what
    is made once a request is then made once."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    found = model.inputs(random)
    if pipe is not None:
        pipe.scheduler.set_timesteps(28, device="cuda")
        pipe.scheduler.set_begin_index(14)
        given = found["timestep"]
        if given.is_floating_point() and given.numel() == 1:  # as FLUX.1's and Qwen-Image's pipelines make it
            found["timestep"] = pipe.scheduler.timesteps[14].expand(1).to(given.dtype) / 1000
    return found
