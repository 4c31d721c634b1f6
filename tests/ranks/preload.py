"""Loaded once in the process that ranks are forked from: what all must have alike. Tokenizers that are trained in
memory come out otherwise in every process."""

from __future__ import annotations

import gc

import torch
import torch._dynamo
from tiny.components import clip_tokenizer, qwen_tokenizer

import diffusers_accel.api  # noqa: F401

torch.set_num_threads(1)
clip_tokenizer()
qwen_tokenizer()
# No collection of garbage need look at what is shared.
gc.collect()
gc.freeze()
