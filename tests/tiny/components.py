"""Shared helpers: the TinyPipeline record, tiny tokenizers, tiny text and image encoders, weight randomisation.

Nothing here touches the network: tokenizers are trained in memory on a few lines, models are built from configs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

PROMPT = "a red fox in the snow"
NEGATIVE = "blurry, low quality"

_CORPUS = [
    PROMPT,
    NEGATIVE,
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    " objects and background:",
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how"
    " the user's text instruction should alter or modify the image. Generate a new image that meets the user's"
    " requirements while maintaining consistency with the original input where appropriate.",
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object attribution and actions without speculation. system user assistant\n",
    "You are a helpful assistant who will generate images and videos from a given prompt. The video is seconds long"
    " and is of frames per second. This video is of height by width resolution.",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based"
    " on textual prompts or user prompts. <Prompt Start>",
    "The video content, dense description, camera, lighting, motion, style, 0 1 2 3 4 5 6 7 8 9.",
]

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyPipeline:
    """A stock diffusers pipeline with tiny random components, and one way to call it."""

    name: str
    family: str
    make: Callable[[], Any] = field(repr=False)
    kwargs: Callable[[int], dict] = field(repr=False)
    output: Callable[[Any], Any] = field(repr=False)
    denoisers: tuple[str, ...] = ("transformer",)

    def build(self, seed: int = 0):
        """A fresh pipeline: float32, CPU, eval mode; the same seed gives the same weights bit for bit."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, steps: int = 4) -> dict:
        """Fresh keyword arguments for one generation (new generator, new tensors)."""
        return self.kwargs(steps)

    def run(self, pipe, steps: int = 4, **overrides):
        """The tensor(s) of one generation."""
        kwargs = self.call(steps)
        kwargs.update(overrides)
        return self.output(pipe(**kwargs))


def images(result):
    return torch.as_tensor(result.images)


def frames(result):
    return torch.as_tensor(result.frames)


def partial(steps: int, rounds_down: bool = False) -> dict:
    """Arguments of an image-to-image call of which `steps` of a longer schedule run.

    The classes multiply steps and strength and round, some up (Flux, SD3) and some down (Wan).
    """
    total = math.ceil(steps / 0.8)
    return {"strength": (steps + (0.1 if rounds_down else -0.1)) / total, "num_inference_steps": total}


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def tensor(*shape: int, seed: int = 2, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)) * scale


def picture(height: int, width: int, seed: int = 3) -> torch.Tensor:
    """An image tensor in [0, 1], (1, 3, height, width), with structure at low frequency."""
    coarse = torch.rand(1, 3, 4, 4, generator=generator(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)


def pil_picture(height: int, width: int, seed: int = 3):
    from PIL import Image

    array = (picture(height, width, seed)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array)


def mask(height: int, width: int) -> torch.Tensor:
    out = torch.zeros(1, 1, height, width)
    out[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return out


@torch.no_grad()
def energise(module: torch.nn.Module, gain: float = 1.0, skip: tuple[str, ...] = ()) -> torch.nn.Module:
    """Give every weight of a denoiser a size at which its blocks matter, zero-initialised layers included.

    Matrices become normal with standard deviation gain / sqrt(fan in); vectors get small noise around their value.
    """
    for name, parameter in module.named_parameters():
        if any(part in name for part in skip) or not parameter.is_floating_point():
            continue
        constant = parameter.numel() == 1 or parameter.std() == 0
        if parameter.ndim >= 2 and name.endswith("weight"):
            fan_in = math.prod(parameter.shape[1:])
            parameter.normal_(0, gain / math.sqrt(fan_in))
        elif parameter.ndim >= 2 and constant:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@torch.no_grad()
def wake(module: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """Add noise to parameters that are constant (zero-initialised layers), leaving the others as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and (parameter.numel() == 1 or parameter.std() == 0):
            parameter.add_(torch.randn_like(parameter) * scale)
    return module


# ---------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def _bpe(suffix: str, specials: tuple[str, ...], size: int) -> tuple[str, str]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    ending = {"end_of_word_suffix": suffix} if suffix else {}
    # Letters come in another order in every process, and the numbers of tokens with them, if nobody puts them in one;
    # those that end a word can be put in one as special tokens alone.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [letter + suffix for letter in alphabet] if suffix else []
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if suffix:  # CLIP: words carry no leading space
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        initial_alphabet=alphabet,
        special_tokens=letters,
        **ending,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(model["vocab"])
    for special in specials:
        vocab.setdefault(special, len(vocab))
    return json.dumps(vocab), json.dumps(model["merges"])


def clip_tokenizer(max_length: int = 32):
    from transformers import CLIPTokenizer

    specials = ("<|startoftext|>", "<|endoftext|>")
    vocab, merges = _bpe("</w>", specials, 620)
    return CLIPTokenizer(
        vocab=json.loads(vocab), merges=[tuple(m) for m in json.loads(merges)], model_max_length=max_length
    )


def t5_tokenizer(max_length: int = 64):
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(i), -4.0) for i in range(33, 127)]
    vocab += [("▁" + word, -3.0) for word in sorted({w for line in _CORPUS for w in line.split()})]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


def qwen_tokenizer(max_length: int = 1024):
    from transformers import Qwen2Tokenizer

    vocab, merges = _bpe("", QWEN_SPECIALS, 640)
    tokenizer = Qwen2Tokenizer(
        vocab=json.loads(vocab),
        merges=[tuple(m) for m in json.loads(merges)],
        model_max_length=max_length,
        additional_special_tokens=list(QWEN_SPECIALS[1:8]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ------------------------------------------------------------------------------------------------ encoders


def clip_text(tokenizer, hidden: int = 32, projection: int | None = None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection or hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    cls = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return wake(cls(config))


def t5_text(tokenizer, hidden: int = 32, umt5: bool = False):
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    cls, config_cls = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    config = config_cls(
        vocab_size=len(tokenizer),
        d_model=hidden,
        d_kv=8,
        d_ff=2 * hidden,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return wake(cls(config))


def clip_vision(hidden: int = 32, size: int = 16, patch: int = 8, projection: bool = False):
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
    )
    return wake((CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config))


# -------------------------------------------------------------------------------------------- autoencoders


def image_vae(latent_channels: int = 4):
    """AutoencoderKL with spatial factor 2."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    return energise(vae)


def wan_vae(z_dim: int = 16):
    """AutoencoderKLWan with factors 8 (space) and 4 (time)."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )
    return energise(vae)


def wan22_vae(z_dim: int = 48):
    """The Wan 2.2 TI2V kind of AutoencoderKLWan: residual, patched, factors 16 (space) and 4 (time)."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )
    return energise(vae)


def unipc(flow_shift: float = 3.0):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
