"""Train flux-shapes, wan-shapes and wan-shapes-long as checkpoints in the stock diffusers classes and format.

Owns the model sizes (below), the tokenizers, the training phases and the saving. The idea: one process, one GPU and a
strict budget of minutes. (1) a VAE on procedural scenes; (2) the latents of a large set of scenes, encoded once and
kept on the GPU; (3) transformer and text encoders together by flow matching, under exactly the conventions of the
stock pipelines (token ids, timesteps, packing, velocity = noise - latents, the scheduler's own shift). The models are
so small that eager training would wait for kernel launches, so the whole step (forward, backward, clipping, optimizer,
moving average) is captured in a CUDA graph per input shape. The moving average is what ships.

    python benchmarks/shapes/train.py flux-shapes --out DIR --minutes 8
    python benchmarks/shapes/train.py wan-shapes --out DIR --minutes 9.5
    python benchmarks/shapes/train.py flux-shapes --out DIR2 --minutes 8 --resume DIR     # goes on from DIR
    python benchmarks/shapes/train.py wan-shapes-long --out DIR --minutes 8 --from WAN    # WAN: wan-shapes' folder

DIR gets three files per model: NAME.tar (pipeline folder, log, scores), NAME-state.tar (raw weights to go on from) and
NAME.png (held-out samples). They are also written now and then on the way, so that a kill loses little.
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count towards the minutes too

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
import textwrap  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes as scene_data  # noqa: E402
import score as scoring  # noqa: E402
from score import FRAMES, MAX_SEQUENCE_LENGTH  # noqa: E402

# --- sizes, as data -------------------------------------------------------------------------------------------------
# Both checkpoints together must stay under 15.5 MiB in float16: 8.1 M parameters and the tokenizers.
FLUX_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 64,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
FLUX_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (16, 32, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 256,
}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
}
T5_TEXT: dict[str, Any] = {
    "d_model": 96,
    "d_kv": 32,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
WAN_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 96,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 7,
    "cross_attn_norm": True,
    "rope_max_seq_len": 128,
}
WAN_VAE: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
FLUX_SHIFT, WAN_SHIFT = 2.0, 3.0  # of the shipped schedulers, and of the training noise levels alike


@dataclass
class VaeStage:
    """A stage of the VAE's training."""

    share: float  # of the VAE's time
    rate: float
    streams: list[tuple[int, int, int, int, float]]  # (resolution, crop, frames, batch, share of the steps)


@dataclass
class FlowStream:
    """One input shape of the flow matching."""

    size: int
    batch: int
    share: float = 1.0  # of the steps, among the streams of the same time
    frames: int | None = None  # the first of the clip's; None: all (the VAE is causal: the latents are the same)
    span: tuple[float, float] = (0.0, 1.0)  # the part of phase 3 in which it is drawn

    @property
    def name(self) -> str:
        return f"flow {self.size}" + (f"x{self.frames}" if self.frames else "")


@dataclass
class Plan:
    """How one model is trained."""

    kind: str
    vae_share: float  # of the minutes
    encode_share: float
    reserve_seconds: float  # for sampling, scoring and saving at the end
    vae_stages: list[VaeStage]  # each with an optimizer and a learning-rate schedule of its own
    streams: list[FlowStream]
    samples: dict[int, int]  # scenes to encode per resolution, at most
    pool: dict[int, int]  # rendered scenes for the VAE per resolution
    drop_captions: float
    frames: int = 1  # of a clip
    train_encoder: bool = True  # the VAE's; without it the latents stay what they were
    peak_rate: float = 1.5e-3
    score_sizes: tuple[int, ...] = (128,)
    score_count: int = 200


PLANS: dict[str, Plan] = {
    "flux-shapes": Plan(
        kind="image", vae_share=0.24, encode_share=0.1, reserve_seconds=30,
        vae_stages=[VaeStage(1.0, 2e-3, [(128, 64, 1, 96, 0.75), (128, 128, 1, 32, 0.15), (256, 256, 1, 8, 0.1)])],
        streams=[FlowStream(128, 384, 0.72), FlowStream(192, 192, 0.12), FlowStream(256, 128, 0.16)],
        samples={128: 160_000, 192: 40_000, 256: 40_000}, pool={128: 12_000, 256: 2_000},
        drop_captions=0.05, score_sizes=(128, 256),
    ),
    "wan-shapes": Plan(
        kind="video", vae_share=0.4, encode_share=0.14, reserve_seconds=30,
        # Small crops of few frames make many steps in the time. A second stage sees all frames: what the causal caches
        # hold late in a clip differs from its beginning, and a decoder that never saw it drifts.
        vae_stages=[
            VaeStage(0.72, 2e-3, [(128, 64, 5, 16, 0.85), (128, 128, 9, 6, 0.15)]),
            VaeStage(0.28, 1e-3, [(128, 64, 17, 8, 0.55), (128, 64, 5, 16, 0.3), (128, 128, 17, 4, 0.15)]),
        ],
        streams=[FlowStream(128, 192)],
        samples={128: 30_000}, pool={128: 2_500},
        drop_captions=0.12, frames=FRAMES,
    ),
    # 4,096 tokens: 16 latent frames of 16x16. Few tokens come first: sixteen frames at 128 pixels (1,024 tokens), and
    # sixteen rows and columns on the clip's beginning (1,280).
    "wan-shapes-long": Plan(
        kind="video", vae_share=0.2, encode_share=0.12, reserve_seconds=40,
        # wan-shapes' decoder saw 17 frames and drifts beyond them. Large batches: 16 chunks are many small kernels.
        vae_stages=[VaeStage(1.0, 1e-3, [(256, 128, 61, 12, 1.0)])],
        streams=[
            FlowStream(128, 96, 0.5, span=(0.0, 0.4)), FlowStream(256, 96, 0.5, frames=17, span=(0.0, 0.4)),
            FlowStream(256, 32, span=(0.4, 1.0)),
        ],
        samples={256: 6_000, 128: 4_000}, pool={256: 200},
        drop_captions=0.12, frames=61, train_encoder=False, peak_rate=1e-3, score_sizes=(256,), score_count=96,
    ),
}  # fmt: skip


def tiny_plan(plan: Plan) -> Plan:
    """The same phases on small pictures, for a dry run of a few steps each on a CPU."""
    frames = min(plan.frames, 21)
    stages = [
        replace(stage, streams=[(size // 4, min(crop, size // 4), min(clip, frames), 2, share)
                                for size, crop, clip, _, share in stage.streams])
        for stage in plan.vae_stages
    ]  # fmt: skip
    return replace(
        plan,
        frames=frames,
        vae_stages=stages,
        streams=[replace(stream, size=stream.size // 4, batch=4) for stream in plan.streams],
        samples={size // 4: 8 for size in plan.samples},
        pool={size // 4: 4 for size in plan.pool},
        score_sizes=tuple(size // 4 for size in plan.score_sizes),
        score_count=4,
        reserve_seconds=15,
    )


class Clock:
    """The budget. Everything asks it, nothing else decides when to stop."""

    def __init__(self, minutes: float) -> None:
        self.total = minutes * 60

    def elapsed(self) -> float:
        return time.monotonic() - START

    def left(self) -> float:
        return self.total - self.elapsed()


def say(text: str) -> None:
    """One progress line."""
    print(f"[{time.monotonic() - START:7.1f}s] {text}", flush=True)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def build_clip_tokenizer() -> Any:
    """A CLIP tokenizer whose merges make one token of every caption word; other words fall apart into bytes."""
    from transformers import CLIPTokenizer

    make: Any = CLIPTokenizer  # its annotations do not know that merges are pairs
    alphabet = _byte_alphabet()
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(letter + "</w>" for letter in alphabet)])}
    merges: list[tuple[str, str]] = []
    # learn merges word by word: split each word with what is known so far, then join its pieces from the left
    for word in [*scene_data.caption_words(), ","]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            index = 0
            while index + 1 < len(pieces):
                if (pieces[index], pieces[index + 1]) == (left, right):
                    pieces[index : index + 2] = [left + right]
                index += 1
        while len(pieces) > 1:
            joined = pieces[0] + pieces[1]
            merges.append((pieces[0], pieces[1]))
            vocabulary.setdefault(joined, len(vocabulary))
            pieces[:2] = [joined]
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return make(vocab=vocabulary, merges=merges, model_max_length=CLIP_TEXT["max_position_embeddings"])


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def build_t5_tokenizer() -> Any:
    """A T5 tokenizer with every caption word as one piece and single characters for the rest."""
    from transformers import T5Tokenizer

    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    for word in scene_data.caption_words():
        pieces.append(("▁" + word, -2.0))
        pieces.append((word, -4.0))
    known = {piece for piece, _ in pieces}
    letters = [chr(code) for code in range(33, 127)]
    pieces += [(letter, -2.0 if letter == "," else -10.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """The components of one pipeline while they are trained."""

    name: str
    kind: str  # "image" or "video"
    vae: Any  # the stock classes; their attributes are made at run time
    transformer: Any
    encoders: dict[str, Any]  # keyed as the pipeline names them
    tokenizers: dict[str, Any]

    def trained(self) -> dict[str, Any]:
        """What phase 3 trains."""
        return {"transformer": self.transformer, **self.encoders}

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """The distinct parameters of what phase 3 trains, named for the state file."""
        pairs: dict[int, tuple[str, torch.Tensor]] = {}
        for part, module in self.trained().items():
            for name, parameter in module.named_parameters():
                pairs.setdefault(id(parameter), (f"{part}.{name}", parameter))
        return list(pairs.values())


def build_parts(name: str) -> Parts:
    """Fresh components with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    t5_tokenizer = build_t5_tokenizer()
    t5_options = {**T5_TEXT, "vocab_size": len(t5_tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    kind = PLANS[name].kind
    if kind == "image":
        from diffusers import AutoencoderKL, FluxTransformer2DModel

        clip_tokenizer = build_clip_tokenizer()
        ids = {"bos_token_id": clip_tokenizer.bos_token_id, "eos_token_id": clip_tokenizer.eos_token_id}
        clip_config = CLIPTextConfig(
            **CLIP_TEXT, **ids, pad_token_id=clip_tokenizer.pad_token_id, vocab_size=len(clip_tokenizer)
        )
        encoders = {
            "text_encoder": CLIPTextModel(clip_config),
            "text_encoder_2": T5EncoderModel(T5Config(**t5_options)),
        }
        tokenizers = {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer}
        transformer = FluxTransformer2DModel(**FLUX_TRANSFORMER)
        return Parts(name, kind, AutoencoderKL(**FLUX_VAE), transformer, encoders, tokenizers)
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    encoders = {"text_encoder": UMT5EncoderModel(UMT5Config(**t5_options))}
    tokenizers = {"tokenizer": t5_tokenizer}
    transformer = WanTransformer3DModel(**WAN_TRANSFORMER)
    return Parts(name, kind, AutoencoderKLWan(**WAN_VAE), transformer, encoders, tokenizers)


def initialise(transformer: nn.Module) -> None:
    """The usual start of a diffusion transformer: Xavier everywhere, zero in the modulations and the output."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        modulation = name.endswith((".linear", "norm_out.linear")) and "norm" in name
        if isinstance(module, nn.Linear) and (modulation or name == "proj_out"):
            nn.init.zeros_(module.weight)


def load_parts(name: str, folder: Path) -> Parts:
    """The components of a saved pipeline, in float32."""
    pipeline = scoring.load_pipeline(folder, torch.device("cpu"), torch.float32)
    kind = PLANS[name].kind
    keys = ["text_encoder", "text_encoder_2"] if kind == "image" else ["text_encoder"]
    encoders = {key: getattr(pipeline, key) for key in keys}
    tokenizers = build_parts(name).tokenizers  # the same; loaded ones would be saved with what loading adds to them
    return Parts(name, kind, pipeline.vae, pipeline.transformer, encoders, tokenizers)


def build_pipeline(parts: Parts) -> Any:
    """The stock pipeline around the components, with the scheduler that the training noise levels match."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, UniPCMultistepScheduler, WanPipeline

    common = {"vae": parts.vae, "transformer": parts.transformer, **parts.encoders, **parts.tokenizers}
    if parts.kind == "image":
        return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=FLUX_SHIFT), **common)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=WAN_SHIFT, num_train_timesteps=1000
    )
    return WanPipeline(scheduler=scheduler, **common)


def count_parameters(parts: Parts) -> dict[str, int]:
    """Distinct parameters per component, and in total."""
    counts = {}
    for name, module in {"vae": parts.vae, **parts.trained()}.items():
        counts[name] = sum(parameter.numel() for parameter in module.parameters())
    return {**counts, "total": sum(counts.values())}


# --- the training step ----------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """One input shape: static buffers, what fills them before a step, and the loss read from them."""

    name: str
    share: float
    fill: Callable[[], None]
    loss: Callable[[], torch.Tensor]
    result: torch.Tensor
    span: tuple[float, float] = (0.0, 1.0)
    graph: Any = None
    warm: int = 0


class Trainer:
    """Optimizer, moving average and one captured CUDA graph per stream; plain eager steps where there is no CUDA."""

    WARM_STEPS = 4  # eager steps of a stream before its capture

    def __init__(
        self, weights: list[torch.Tensor], device: torch.device, peak_rate: float, average: bool, decay: float = 0.01
    ) -> None:
        self.weights, self.device, self.peak_rate = weights, device, peak_rate
        self.cuda = device.type == "cuda"
        self.capture = self.cuda
        self.streams: list[Stream] = []
        self.steps = 0
        self.rate = torch.zeros((), device=device)
        self.follow = torch.ones((), device=device)  # share of the new weights in the moving average
        self.average = [weight.detach().clone() for weight in weights] if average else None
        groups = [
            {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": decay},
            {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8}
        if self.cuda:
            try:
                self.optimizer = torch.optim.AdamW(groups, lr=self.rate, fused=True, capturable=True, **options)
            except Exception as error:  # an older torch: the unfused kind can be captured as well
                say(f"warning: no fused AdamW ({error})")
                self.optimizer = torch.optim.AdamW(groups, lr=self.rate, foreach=True, capturable=True, **options)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate  # the very tensor, so that a graph reads what `step` writes
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, **options)
        self.side = torch.cuda.Stream(device) if self.cuda else None
        self.keep_snapshot()

    def add_stream(
        self,
        name: str,
        share: float,
        fill: Callable[[], None],
        loss: Callable[[], torch.Tensor],
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.streams.append(Stream(name, share, fill, loss, torch.zeros((), device=self.device), span))

    def _work(self, stream: Stream) -> None:
        """Forward, backward, clipping, optimizer and moving average: what a graph holds."""
        self.optimizer.zero_grad(set_to_none=True)
        # no autocast cache: a cached cast would live outside the graph
        with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
            loss = stream.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if self.average is not None:
                difference = torch._foreach_sub(self.weights, self.average)
                torch._foreach_mul_(difference, self.follow)
                torch._foreach_add_(self.average, difference)
            stream.result.copy_(loss.detach())

    def _capture(self, stream: Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._work(stream)
        except Exception as error:
            self.capture = False
            self.optimizer.zero_grad(set_to_none=True)
            say(f"warning: CUDA graph capture of {stream.name} failed, going on in eager mode: {error!r}")
            traceback.print_exc()
            torch.cuda.synchronize()
            return
        stream.graph = graph
        say(f"captured {stream.name}")

    def step(self, stream: Stream, rate: float) -> None:
        """One training step at this learning rate; asynchronous on CUDA."""
        follow = 1 - min(0.9993, (1 + self.steps) / (20 + self.steps))
        self.follow.fill_(follow)
        if self.cuda:
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        stream.fill()
        if stream.graph is None and self.capture and stream.warm >= self.WARM_STEPS:
            self._capture(stream)
        if stream.graph is not None:
            stream.graph.replay()
        elif self.capture and self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self._work(stream)
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            self._work(stream)
        stream.warm += 1
        self.steps += 1

    @torch.no_grad()
    def keep_snapshot(self) -> None:
        """Remember the weights as something to fall back on."""
        self.snapshot = [weight.detach().clone() for weight in self.weights]
        self.average_snapshot = [weight.clone() for weight in self.average] if self.average is not None else None

    @torch.no_grad()
    def restore_snapshot(self) -> None:
        """Back to the remembered weights, with an empty optimizer and a lower rate (after a loss that is no number)."""
        torch._foreach_copy_(self.weights, self.snapshot)
        if self.average is not None and self.average_snapshot is not None:
            torch._foreach_copy_(self.average, self.average_snapshot)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        self.peak_rate *= 0.5

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average in the modules for a while."""
        if self.average is None:
            yield
            return
        raw = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, raw)

    def run(
        self,
        label: str,
        clock: Clock,
        until: float,
        log: Callable[[dict[str, Any]], None],
        seed: int,
        on_checkpoint: Callable[[], None] | None = None,
        checkpoint_seconds: float = 120,
        most_steps: int | None = None,
    ) -> dict[str, float]:
        """Train until clock.elapsed() reaches `until`; the rate warms up, stays, and falls to zero by the clock."""
        begin, picker = clock.elapsed(), random.Random(seed)
        first_step, every = self.steps, 25 if self.cuda else 1
        recent: dict[str, float] = {}
        last_checkpoint, failures = begin, 0
        while True:
            progress = (clock.elapsed() - begin) / max(until - begin, 1e-6)
            if progress >= 1 or (most_steps is not None and self.steps - first_step >= most_steps):
                break
            warm_up = min(1.0, (self.steps - first_step + 1) / 300)
            # flat for the first third, then a cosine to zero
            fall = 1.0 if progress < 0.35 else 0.5 * (1 + math.cos(math.pi * (progress - 0.35) / 0.65))
            # a cut of the steps, as in a dry run, stands for the time
            place = progress if most_steps is None else (self.steps - first_step) / most_steps
            active = [one for one in self.streams if one.span[0] <= place < one.span[1]]
            stream = picker.choices(active, [one.share for one in active])[0]
            cold = next((one for one in self.streams if one.graph is None), None)
            if self.capture and cold is not None:
                stream = cold  # capture every shape first, so that the rest runs at full speed
            self.step(stream, self.peak_rate * warm_up * fall)
            if self.steps % every == 0:
                loss = float(stream.result)  # the only synchronisation of the loop
                if not math.isfinite(loss):
                    failures += 1
                    say(f"warning: {label} loss is not finite at step {self.steps}; restoring the last snapshot")
                    self.restore_snapshot()
                    if failures > 5:
                        say(f"warning: {label} gives up early")
                        break
                    continue
                recent[stream.name] = loss if stream.name not in recent else 0.9 * recent[stream.name] + 0.1 * loss
                if self.steps % (every * 8) == 0:
                    rate = self.peak_rate * warm_up * fall
                    log({"phase": label, "step": self.steps, "seconds": round(clock.elapsed(), 2), "rate": rate,
                         **{f"loss {name}": round(value, 6) for name, value in recent.items()}})  # fmt: skip
                if clock.elapsed() - last_checkpoint > checkpoint_seconds:
                    say(f"{label}: step {self.steps}, {recent}")
                    self.keep_snapshot()
                    if on_checkpoint is not None and until - clock.elapsed() > 20:
                        on_checkpoint()
                    last_checkpoint = clock.elapsed()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = clock.elapsed() - begin
        summary = {"steps": self.steps - first_step, "seconds": round(seconds, 1), **recent}
        log({"phase": label, "end": True, **summary})
        say(f"{label} done: {summary}")
        return summary

    def release(self) -> None:
        """Drop graphs and gradients, so that their memory is free for what comes next."""
        self.optimizer.zero_grad(set_to_none=True)
        for stream in self.streams:
            stream.graph = None
        self.streams.clear()
        if self.cuda:
            torch.cuda.empty_cache()


# --- phase 1: the VAE -----------------------------------------------------------------------------------------------


def wan_moments(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """What vae.encode computes before it makes a distribution."""
    return vae._encode(pictures)


def wan_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """vae.decode without its final clamp, which would stop gradients of what is out of range."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        options = {"first_chunk": True} if index == 0 else {}
        chunks.append(
            vae.decoder(hidden[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **options)
        )
    vae.clear_cache()
    return torch.cat(chunks, 2)


def vae_loss(
    decoded: torch.Tensor, target: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """Absolute and squared error, sharper edges, and a pull of the latents towards a unit normal that stays light."""
    decoded, mean, log_variance = decoded.float(), mean.float(), log_variance.float()
    error = decoded - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * edges + 1e-4 * divergence


@torch.no_grad()
def render_pool(plan: Plan, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Rendered scenes as bytes on the device."""
    count = plan.pool[size]
    some = scene_data.sample_scenes(plan.kind, count, seed)
    step = 256 if plan.kind == "image" else 32 if plan.frames <= FRAMES else 8
    parts = [
        ((scene_data.render(some.take(slice(begin, begin + step)), size, device, plan.frames) + 1) * 127.5)
        .round().byte() for begin in range(0, count, step)
    ]  # fmt: skip
    return torch.cat(parts)


def add_vae_stream(
    trainer: Trainer,
    vae: Any,
    plan: Plan,
    pools: dict[int, torch.Tensor],
    stream: tuple[int, int, int, int, float],
    device: torch.device,
) -> None:
    """Random crops and moments of the rendered scenes, in static buffers, and the loss on them."""
    size, crop, clip_frames, batch, share = stream
    video = plan.kind == "video"
    shape = (batch, 3, clip_frames, crop, crop) if video else (batch, 3, crop, crop)
    target = torch.zeros(shape, device=device)
    latent_shape = (batch, 16, (clip_frames - 1) // 4 + 1, crop // 8, crop // 8)
    noise = torch.zeros(latent_shape if video else (batch, 16, crop // 8, crop // 8), device=device)

    pool, room = pools[size], size - crop

    def fill() -> None:
        chosen = pool[torch.randint(len(pool), (batch,), device=device)]
        left, top = random.randint(0, room), random.randint(0, room)
        chosen = chosen[..., top : top + crop, left : left + crop]
        if video:
            first = random.randrange(plan.frames - clip_frames + 1)
            chosen = chosen[:, :, first : first + clip_frames]
        target.copy_(chosen).div_(127.5).sub_(1)
        noise.normal_()

    def loss() -> torch.Tensor:
        moments = wan_moments(vae, target) if video else vae.encoder(target)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + (0.5 * log_variance).exp() * noise
        decoded = wan_decode(vae, latents) if video else vae.decoder(latents)
        return vae_loss(decoded, target, mean, log_variance)

    trainer.add_stream(f"vae {crop}x{clip_frames}", share, fill, loss)


def train_vae(
    parts: Parts, plan: Plan, clock: Clock, device: torch.device, seed: int, log: Any, most_steps: int | None
) -> dict[str, Any]:
    """Phase 1; sets the latent statistics in the VAE's config."""
    vae: Any = parts.vae.to(device).train().requires_grad_(True)
    if not plan.train_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    sizes = sorted({stream[0] for stage in plan.vae_stages for stream in stage.streams})
    pools = {size: render_pool(plan, size, seed + size, device) for size in sizes}
    say(f"VAE pools rendered: {plan.pool}")
    begin = clock.elapsed()
    seconds = max(1.0, plan.vae_share * clock.total - begin)
    summary: dict[str, Any] = {"stages": []}
    spent = 0.0
    for number, stage in enumerate(plan.vae_stages, start=1):
        weights = [weight for weight in vae.parameters() if weight.requires_grad]
        trainer = Trainer(weights, device, stage.rate, average=False, decay=0.0)
        for stream in stage.streams:
            add_vae_stream(trainer, vae, plan, pools, stream, device)
        spent += stage.share / sum(one.share for one in plan.vae_stages)
        until = begin + seconds * spent
        summary["stages"].append(trainer.run(f"vae {number}", clock, until, log, seed, most_steps=most_steps))
        trainer.release()
    vae.eval().requires_grad_(False)
    size = plan.score_sizes[0]
    batch = 16 if most_steps is None else 2
    count = 4 * batch if plan.frames <= FRAMES else batch
    summary["psnr dB"] = scoring.reconstruction_psnr(vae, plan.kind, size, count, batch, plan.frames)
    say(f"VAE reconstruction of held-out scenes: {summary['psnr dB']} dB")
    if plan.train_encoder:
        measure_latents(vae, plan, device, seed, batch * 16)
    return summary


@torch.no_grad()
def measure_latents(vae: Any, plan: Plan, device: torch.device, seed: int, count: int) -> None:
    """Write the statistics that bring the latents to about zero mean and unit variance into the config."""
    some = scene_data.sample_scenes(plan.kind, count, seed + 5)
    step = 64 if plan.kind == "image" else 16
    latents = torch.cat([
        vae.encode(scene_data.render(some.take(slice(begin, begin + step)), plan.streams[0].size, device, plan.frames))
        .latent_dist.mode() for begin in range(0, count, step)
    ])  # fmt: skip
    if plan.kind == "image":
        shift, scale = float(latents.mean()), 1 / float(latents.std())
        vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
        say(f"latents: shift_factor {shift:.4f}, scaling_factor {scale:.4f}")
    else:
        mean = latents.mean((0, 2, 3, 4))
        spread = latents.std((0, 2, 3, 4))
        # a channel that the VAE hardly uses must not be blown up into something the transformer has to predict
        spread = spread.clamp(min=0.2 * float(spread.max()))
        vae.register_to_config(
            latents_mean=[round(value, 5) for value in mean.tolist()],
            latents_std=[round(value, 5) for value in spread.tolist()],
        )
        say(f"latents: std of the channels {[round(value, 3) for value in spread.tolist()]}")


def normalise_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them: the inverse of what the pipelines do before they decode."""
    if latents.ndim == 4:
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    spread = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / spread


# --- phase 2: latents and token ids on the device -------------------------------------------------------------------


@dataclass
class Material:
    """Encoded scenes of one resolution, with the token ids of their captions."""

    latents: torch.Tensor
    ids: dict[str, torch.Tensor] = field(default_factory=dict)


def tokenise(parts: Parts, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids (and the mask that Wan uses) exactly as the stock pipelines make them."""
    ids: dict[str, torch.Tensor] = {}
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    if parts.kind == "image":
        clip = parts.tokenizers["tokenizer"]
        ids["clip"] = clip(captions, max_length=clip.model_max_length, **options).input_ids
        ids["t5"] = parts.tokenizers["tokenizer_2"](captions, max_length=MAX_SEQUENCE_LENGTH, **options).input_ids
        return ids
    output = parts.tokenizers["tokenizer"](
        captions, max_length=MAX_SEQUENCE_LENGTH, return_attention_mask=True, add_special_tokens=True, **options
    )
    return {"t5": output.input_ids, "mask": output.attention_mask}


def tokenise_fast(parts: Parts, captions: list[str]) -> dict[str, torch.Tensor]:
    """The same as `tokenise` for plain captions, word by word from a table: a hundred thousand in a second.

    A sample is compared with the real tokenizers; if anything differs, they do all the work.
    """
    sample = captions[:: max(1, len(captions) // 200)]
    tokenizers = {"clip": parts.tokenizers.get("tokenizer"), "t5": parts.tokenizers.get("tokenizer_2")}
    if parts.kind == "video":
        tokenizers = {"t5": parts.tokenizers["tokenizer"]}
    words = [caption.replace(",", " ,").split() for caption in captions]

    def table_ids(key: str, rows: list[list[str]]) -> torch.Tensor:
        tokenizer: Any = tokenizers[key]
        plain = {"add_special_tokens": False}
        table = {word: tokenizer(word, **plain).input_ids for word in scene_data.caption_words()}
        table[","] = tokenizer("a,", **plain).input_ids[len(tokenizer("a", **plain).input_ids) :]
        if any(len(ids) != 1 for ids in table.values()):
            raise ValueError("a caption word is not one token")
        single = {word: ids[0] for word, ids in table.items()}
        length = tokenizer.model_max_length if key == "clip" else MAX_SEQUENCE_LENGTH
        first = [tokenizer.bos_token_id] if key == "clip" else []
        result = numpy.full((len(rows), length), tokenizer.pad_token_id, numpy.int64)
        for index, row in enumerate(rows):
            ids = [*first, *(single[word] for word in row), tokenizer.eos_token_id]
            result[index, : len(ids)] = ids
        return torch.from_numpy(result)

    try:
        ids = {key: table_ids(key, words) for key in tokenizers}
        if parts.kind == "video":
            ids["mask"] = (ids["t5"] != 0).long()
        chosen = slice(None, None, max(1, len(captions) // 200))
        exact = tokenise(parts, sample)
        if all(torch.equal(ids[key][chosen], exact[key]) for key in exact):
            return ids
        say("warning: the word table disagrees with the tokenizers; using them")
    except (KeyError, ValueError) as error:
        say(f"warning: no word table ({error!r}); using the tokenizers")
    return tokenise(parts, captions)


@torch.no_grad()
def encode_material(
    parts: Parts, plan: Plan, size: int, count: int, until: float, clock: Clock, device: torch.device, seed: int
) -> Material:
    """Render and encode scenes until there are `count` of them or the clock says stop."""
    vae: Any = parts.vae
    some = scene_data.sample_scenes(plan.kind, count, seed + 10 * size)
    batch = 512 * 128 * 128 // (size * size) if plan.kind == "image" else 64 if size <= 128 else 16
    batch = min(batch, count)
    chunks: list[torch.Tensor] = []
    for begin in range(0, count, batch):
        pictures = scene_data.render(some.take(slice(begin, begin + batch)), size, device, plan.frames)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            latents = vae.encode(pictures).latent_dist.mode()
        chunks.append(normalise_latents(vae, latents.float()).to(torch.bfloat16))
        if device.type == "cuda":
            torch.cuda.synchronize()
        if clock.elapsed() > until:
            break
    latents = torch.cat(chunks)
    captions = scene_data.captions_of(some.take(slice(0, len(latents))), seed=seed + size)
    ids = {name: values.to(device) for name, values in tokenise_fast(parts, captions).items()}
    say(f"encoded {len(latents)} of {count} scenes at {size} px; latent std {float(latents.float().std()):.3f}")
    return Material(latents, ids)


# --- phase 3: flow matching -----------------------------------------------------------------------------------------


def position_ids(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """FluxPipeline's text and image ids; made ahead because it makes them on the host, which no graph can capture."""
    from diffusers import FluxPipeline

    image_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, torch.float32)
    return torch.zeros(MAX_SEQUENCE_LENGTH, 3, device=device), image_ids


def flux_prediction(
    parts: Parts, noisy: torch.Tensor, sigma: torch.Tensor, ids: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The velocity as FluxPipeline asks for it, unpacked to [batch, 16, height, width]."""
    from diffusers import FluxPipeline

    count, channels, height, width = noisy.shape
    packed = FluxPipeline._pack_latents(noisy, count, channels, height, width)
    pooled = parts.encoders["text_encoder"](ids["clip"], output_hidden_states=False).pooler_output
    states = parts.encoders["text_encoder_2"](ids["t5"], output_hidden_states=False)[0]
    output = parts.transformer(
        hidden_states=packed,
        timestep=sigma,  # the pipeline passes t / 1000, which is sigma
        guidance=None,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=ids["text positions"],
        img_ids=ids["image positions"],
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(output, height * 8, width * 8, 8)


def wan_prediction(
    parts: Parts, noisy: torch.Tensor, sigma: torch.Tensor, ids: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The velocity as WanPipeline asks for it."""
    # the additive form of the mask that the encoder would build itself with a copy from the host
    kept = ids["mask"][:, None, None, :].to(torch.float32)
    blocked = ((1 - kept) * -1e9).expand(-1, 1, kept.shape[-1], -1)
    states = parts.encoders["text_encoder"](ids["t5"], blocked).last_hidden_state
    states = states * ids["mask"][..., None].to(states.dtype)  # the pipeline cuts at the mask and pads with zeros
    return parts.transformer(
        hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=states, return_dict=False
    )[0]


def add_flow_streams(
    trainer: Trainer, parts: Parts, plan: Plan, materials: dict[int, Material], device: torch.device
) -> None:
    """The plan's streams; everything that varies is written into static buffers on the device."""
    predict = flux_prediction if parts.kind == "image" else wan_prediction
    shift = FLUX_SHIFT if parts.kind == "image" else WAN_SHIFT
    empty = {name: values.to(device) for name, values in tokenise(parts, [""]).items()}
    for stream in plan.streams:
        material, batch = materials[stream.size], stream.batch
        if stream.frames is not None:
            latents = material.latents[:, :, : (stream.frames - 1) // 4 + 1]
            material = Material(latents, material.ids)
        clean = torch.zeros(batch, *material.latents.shape[1:], device=device)
        noise = torch.zeros_like(clean)
        sigma = torch.zeros(batch, device=device)
        ids = {name: values[:1].repeat(batch, 1) for name, values in material.ids.items()}
        if parts.kind == "image":
            ids["text positions"], ids["image positions"] = position_ids(clean.shape[2], clean.shape[3], device)

        def fill(
            material: Material = material, clean: torch.Tensor = clean, noise: torch.Tensor = noise,
            sigma: torch.Tensor = sigma, ids: dict[str, torch.Tensor] = ids, batch: int = batch,
        ) -> None:  # fmt: skip
            index = torch.randint(len(material.latents), (batch,), device=device)
            clean.copy_(material.latents[index])
            noise.normal_()
            # the noise levels of the sampler: uniform, then the scheduler's shift; stratified over the batch
            uniform = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
            sigma.copy_(shift * uniform / (1 + (shift - 1) * uniform))
            dropped = torch.rand(batch, 1, device=device) < plan.drop_captions
            for name, values in material.ids.items():
                ids[name].copy_(torch.where(dropped, empty[name], values[index]))

        def loss(
            clean: torch.Tensor = clean, noise: torch.Tensor = noise, sigma: torch.Tensor = sigma,
            ids: dict[str, torch.Tensor] = ids,
        ) -> torch.Tensor:  # fmt: skip
            level = sigma.view(-1, *[1] * (clean.ndim - 1))
            noisy = (1 - level) * clean + level * noise
            return (predict(parts, noisy, sigma, ids).float() - (noise - clean)).square().mean()

        trainer.add_stream(stream.name, stream.share, fill, loss, stream.span)


# --- saving ---------------------------------------------------------------------------------------------------------


def save_pipeline(parts: Parts, folder: Path) -> None:
    """The stock folder in float16; the modules themselves stay as they are."""
    half = build_parts(parts.name)  # a fresh set, so that compiled calls, caches and memory layouts stay behind
    half.tokenizers = parts.tokenizers
    half.vae.load_state_dict(parts.vae.state_dict())
    statistics = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    half.vae.register_to_config(**{key: parts.vae.config[key] for key in statistics if key in parts.vae.config})
    for key, module in half.trained().items():
        module.load_state_dict(parts.trained()[key].state_dict())
    for module in [half.vae, *half.trained().values()]:
        module.half().eval()
        for name, weight in module.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                say(f"warning: {name} is not finite in float16")
    if folder.exists():
        shutil.rmtree(folder)
    build_pipeline(half).save_pretrained(folder, safe_serialization=True)
    # the name that both transformers 4 and 5 know for the tokenizer that reads tokenizer.json
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    for key in ("tokenizer", "tokenizer_2"):
        if index.get(key, [None, None])[1] == "T5Tokenizer":
            index[key][1] = "T5TokenizerFast"
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def write_tar(path: Path, folder: Path, inside: str) -> None:
    """One tar, put in place only when it is whole."""
    temporary = path.with_name(path.name + ".part")
    with tarfile.open(temporary, "w") as archive:
        archive.add(folder, arcname=inside)
    os.replace(temporary, path)


def write_state(parts: Parts, path: Path, scratch: Path, facts: dict[str, Any]) -> None:
    """The raw (not averaged) weights in float16, to go on from; the VAE and the average are in the pipeline tar."""
    from safetensors.torch import save_file

    folder = scratch / "state"
    folder.mkdir(exist_ok=True)
    tensors = {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in parts.weights()}
    save_file(tensors, str(folder / "raw.safetensors"))
    (folder / "facts.json").write_text(json.dumps(facts, indent=2))
    write_tar(path, folder, "state")


def read_state(name: str, folder: Path, scratch: Path) -> tuple[Parts, dict[str, torch.Tensor], dict[str, Any]]:
    """The components (with averaged weights), the raw weights if they are there, and the facts of earlier runs."""
    from safetensors.torch import load_file

    with tarfile.open(folder / f"{name}.tar") as archive:
        archive.extractall(scratch / "earlier", filter="data")
    parts = load_parts(name, scratch / "earlier" / name)
    state = folder / f"{name}-state.tar"
    if not state.exists():
        return parts, {}, {}
    with tarfile.open(state) as archive:
        archive.extractall(scratch / "earlier", filter="data")
    raw = load_file(str(scratch / "earlier" / "state" / "raw.safetensors"))
    return parts, raw, json.loads((scratch / "earlier" / "state" / "facts.json").read_text())


CALLS = {
    "flux-shapes": """from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("flux-shapes", dtype=torch.bfloat16).to("cuda")
image = pipeline(
    "a large red circle at the top left and a small blue square in the center, on a striped dark background",
    height=128, width=128, num_inference_steps=24, max_sequence_length=64,
).images[0]""",
    "wan-shapes": """from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("wan-shapes", dtype=torch.bfloat16).to("cuda")
frames = pipeline(
    "a large red circle moving right, on a striped dark background",
    height=128, width=128, num_frames=17, num_inference_steps=24, guidance_scale=4.0, max_sequence_length=64,
).frames[0]""",
    "wan-shapes-long": """from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("benchmarks/shapes/wan-shapes-long", dtype=torch.bfloat16).to("cuda")
frames = pipeline(
    "a large red circle moving right, on a striped dark background",
    height=256, width=256, num_frames=61, num_inference_steps=24, guidance_scale=4.0, max_sequence_length=64,
).frames[0]""",
}


def model_card(parts: Parts, facts: dict[str, Any]) -> str:
    """README.md of the checkpoint: only what was measured."""
    subject = "text to image" if parts.kind == "image" else "text to video"
    counts = "\n".join(f"| {name} | {count:,} |" for name, count in count_parameters(parts).items())
    vocabulary = (
        f"Colours: {', '.join(scene_data.COLOUR_NAMES)}. Shapes: {', '.join(scene_data.SHAPES)}. Sizes: large, small. "
        + (f"Places: {', '.join(scene_data.PLACES)}. " if parts.kind == "image" else "")
        + (f"Motions: {', '.join(scene_data.MOTION_NAMES)}. " if parts.kind == "video" else "")
        + f"Backgrounds: {', '.join(scene_data.TEXTURES)}; {', '.join(scene_data.TONE_NAMES)}."
    )
    guidance = (
        "There is no guidance embedding; any `guidance_scale` is ignored."
        if parts.kind == "image"
        else "Captions were dropped in 12% of the samples; `guidance_scale` around 4 matters."
    )
    start = facts.get("started from")
    purpose = (
        f"A very small {subject} model in the stock diffusers classes, trained from {start or 'scratch'} on procedural "
        "captioned scenes (`benchmarks/shapes/scenes.py`). It exists to test and measure inference code on a real, "
        "working checkpoint."
    )
    return f"""---
license: apache-2.0
library_name: diffusers
---

# {parts.name}

{textwrap.fill(purpose, 118)}

{textwrap.fill(vocabulary, 118)}

Captions read like the one below. About one (colour, shape, {"place" if parts.kind == "image" else "motion"})
combination in ten never occurred in training; the scores are measured on scenes made of those only.

```python
import torch
{CALLS[parts.name]}
```

Trained with `max_sequence_length=64`; pass it. {guidance}

| component | parameters |
| --- | --- |
{counts}

## Training and scores

```json
{json.dumps(facts, indent=2)}
```

Licence: Apache-2.0. The data is generated by the code; no other data was used.
"""


def contact_sheet(pipeline: Any, parts: Parts, plan: Plan, path: Path, count: int, steps: int | None) -> None:
    """Held-out samples with their captions as one PNG, at most 128 pixels each; a video is a row of frames."""
    from PIL import Image, ImageDraw

    size = plan.score_sizes[0]
    video = plan.kind == "video"
    call = {**scoring.VIDEO_CALL, "num_frames": plan.frames} if video else dict(scoring.IMAGE_CALL)
    if steps is not None:
        call["num_inference_steps"] = steps
    _, captions = scene_data.held_out_captions(plan.kind, count, scoring.SEED_OF_HELD_OUT)
    pictures = scoring.generate(pipeline, captions, size, 7, count, call)
    if size > 128:
        pictures = nn.functional.avg_pool2d(pictures.flatten(1, -3), size // 128).unflatten(1, pictures.shape[1:-2])
    pixels = (pictures.clamp(0, 1) * 255).byte().cpu().numpy()
    if video:
        shown = numpy.linspace(0, plan.frames - 1, 5).round().astype(int)
        tiles = [numpy.concatenate([video[:, frame] for frame in shown], 2) for video in pixels]
        columns, letters = 2, 100
    else:
        tiles, columns, letters = list(pixels), 6, 24
    height, width = tiles[0].shape[1:]
    text_height, gap = 62 if plan.kind == "image" else 18, 6
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + text_height + gap)
        sheet.paste(Image.fromarray(tile.transpose(1, 2, 0)), (x, y))
        draw.text((x, y + height + 1), textwrap.fill(caption, letters), fill="black", spacing=0)
    sheet.save(path)


# --- everything together --------------------------------------------------------------------------------------------


def compile_blocks(parts: Parts) -> bool:
    """Let the compiler fuse the transformer's blocks in place (their stock class stays)."""
    try:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # one per class, input shape and mode
        for module in parts.transformer.modules():
            if type(module).__name__ in parts.transformer._repeated_blocks:
                module.compile(dynamic=False)
        return True
    except Exception as error:
        say(f"warning: no compilation ({error!r})")
        return False


def run(options: argparse.Namespace) -> None:
    """All phases of one model."""
    name: str = options.name
    plan = PLANS[name]
    if options.tiny:
        plan = tiny_plan(plan)
    if options.rate is not None:
        plan.peak_rate = options.rate
    elif options.resume is not None:
        plan.peak_rate *= 0.6
    if options.vae_share is not None:
        plan.vae_share = options.vae_share
    clock = Clock(options.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        # With cuDNN's attention, training flux-shapes ended in an illegal memory access (torch 2.11, cuDNN 9.19), and
        # never without it. CLIP's causal attention over 77 tokens is the suspect. Others are as fast at these sizes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif options.tiny:
        torch.set_num_threads(1)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    folder = scratch / name
    log_lines: list[str] = []
    phase_steps = (14 if device.type == "cuda" else 3) if options.tiny else None  # 14 reaches the captures
    sample_steps = 2 if options.tiny else None

    def log(row: dict[str, Any]) -> None:
        log_lines.append(json.dumps(row))

    facts: dict[str, Any] = {"torch": torch.__version__, "gpu": gpu, "seed": options.seed, "minutes": options.minutes}
    raw: dict[str, torch.Tensor] = {}
    if options.resume is not None:
        parts, raw, earlier = read_state(name, options.resume, scratch)
        facts["earlier runs"] = [*earlier.pop("earlier runs", []), earlier]
    elif options.start is not None:
        parts = load_parts(name, options.start)
        facts["started from"] = options.start.name
    elif not plan.train_encoder:
        raise SystemExit(f"{name} keeps the VAE's encoder: give --from or --resume")
    else:
        parts = build_parts(name)
        initialise(parts.transformer)
    if options.vae is not None:
        from safetensors.torch import load_file

        weights_file = options.vae / "diffusion_pytorch_model.safetensors"
        parts.vae.load_state_dict({key: value.float() for key, value in load_file(weights_file).items()})
        plan.vae_stages = plan.vae_stages[-1:]
        facts["vae started from"] = options.vae.name
    parts.vae.to(device)
    if device.type == "cuda":  # the layout of the tensor-core convolutions
        for parameter in parts.vae.parameters():
            if parameter.ndim in (4, 5):
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)
    for module in parts.trained().values():
        module.to(device).train()
    say(f"{name} on {gpu}, torch {torch.__version__}; parameters {count_parameters(parts)}")
    say(f"float16 weights: {2 * count_parameters(parts)['total'] / 2**20:.2f} MiB")

    # (1)
    if options.resume is None:
        facts["vae"] = train_vae(parts, plan, clock, device, options.seed, log, phase_steps)
    else:
        parts.vae.eval().requires_grad_(False)
    say(f"phase 2 begins, {clock.left():.0f} s left")

    # (2) the share of each resolution in the time is that of its pixels
    begin = clock.elapsed()
    seconds = max(2.0, plan.encode_share * clock.total)
    weights = {size: count * size * size for size, count in plan.samples.items()}
    materials, spent = {}, 0
    for size, count in plan.samples.items():
        spent += weights[size]
        until = begin + seconds * spent / sum(weights.values())
        run_seed = options.seed + (1000 if options.resume else 0)
        materials[size] = encode_material(parts, plan, size, count, until, clock, device, run_seed)
    facts["scenes"] = {f"{size} px": len(material.latents) for size, material in materials.items()}

    # (3)
    named = parts.weights()
    trainer = Trainer([weight for _, weight in named], device, plan.peak_rate, average=True)
    if raw:  # the average goes on from the shipped weights, the weights from the raw ones
        with torch.no_grad():
            for weight_name, weight in named:
                if weight_name in raw:
                    weight.copy_(raw[weight_name].to(weight))
        trainer.keep_snapshot()
    if options.compile and not compile_blocks(parts):
        facts["compile"] = False
    add_flow_streams(trainer, parts, plan, materials, device)

    def write(with_state: bool = True) -> None:
        with trainer.averaged():
            save_pipeline(parts, folder)
        (folder / "README.md").write_text(model_card(parts, facts))
        (folder / "training-log.jsonl").write_text("\n".join(log_lines) + "\n")
        (folder / "scores.json").write_text(json.dumps(facts.get("scores", {}), indent=2) + "\n")
        write_tar(out / f"{name}.tar", folder, name)
        if with_state:
            write_state(parts, out / f"{name}-state.tar", scratch, facts)

    say("flow matching begins")
    until = max(clock.total - plan.reserve_seconds, clock.elapsed() + 1)
    for attempt in range(3):
        try:
            facts["flow"] = trainer.run(
                "flow", clock, until, log, options.seed + 1 + attempt, write, options.checkpoint_seconds, phase_steps
            )
            break
        except Exception as error:  # step down rather than lose the run: no compilation first, then no graphs
            compiled = any(module._compiled_call_impl is not None for module in parts.transformer.modules())
            say(f"warning: training failed ({error!r}); going on without {'compilation' if compiled else 'graphs'}")
            traceback.print_exc()
            for module in parts.transformer.modules():
                module._compiled_call_impl = None
            trainer.capture = trainer.capture and compiled
            for stream in trainer.streams:
                stream.graph, stream.warm = None, 0
            trainer.restore_snapshot()
            trainer.peak_rate *= 2  # it is not the rate's fault
    facts["flow"] = facts.get("flow", "failed")
    facts["seconds before scoring"] = round(clock.elapsed(), 1)
    for module in parts.trained().values():
        module.eval()
    write()
    say("saved; scoring")
    trainer.release()

    torch.backends.cudnn.benchmark = False  # each shape comes only a few times from here on
    # the end is allowed to fail: what counts is saved already
    try:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipeline = scoring.load_pipeline(folder, device, dtype)
        contact_sheet(pipeline, parts, plan, out / f"{name}.png", 4 if options.tiny else 24, sample_steps)
        say("contact sheet written")
        del pipeline
        deadline = START + clock.total - 0.3 * plan.reserve_seconds
        count = plan.score_count if clock.left() > 0.5 * plan.reserve_seconds else 50
        facts["scores"] = scoring.score(
            folder, count, device, dtype, plan.score_sizes, sample_steps, 100, deadline, plan.frames
        )
    except Exception as error:
        say(f"warning: scoring failed: {error!r}")
        traceback.print_exc()
    facts["seconds in all"] = round(clock.elapsed(), 1)
    # only the texts changed since the last save
    (folder / "README.md").write_text(model_card(parts, facts))
    (folder / "training-log.jsonl").write_text("\n".join(log_lines) + "\n")
    (folder / "scores.json").write_text(json.dumps(facts.get("scores", {}), indent=2) + "\n")
    write_tar(out / f"{name}.tar", folder, name)
    write_state(parts, out / f"{name}-state.tar", scratch, facts)
    for path in sorted(out.glob(f"{name}*")):
        say(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
    shutil.rmtree(scratch, ignore_errors=True)
    say("done")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PLANS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a folder with NAME.tar and NAME-state.tar to go on from")
    parser.add_argument("--from", dest="start", type=Path, help="a pipeline folder of the same sizes to start from")
    parser.add_argument("--rate", type=float, help="peak learning rate of phase 3")
    parser.add_argument("--vae-share", type=float, help="share of the minutes for the VAE")
    parser.add_argument("--vae", type=Path, help="a VAE folder that has been through all but the last stage of phase 1")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks before the capture")
    parser.add_argument("--checkpoint-seconds", type=float, default=100)
    parser.add_argument("--tiny", action="store_true", help="a few steps of every phase, for a dry run on a CPU")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
