"""Caching policies: the decision to skip a step, and the prediction of a skipped value. Arithmetic only, no tensors."""

from __future__ import annotations

from .accumulated import Accumulated
from .dbcache import DBCache
from .easycache import EasyCache, change_ratio, estimated_change
from .magcache import MagCache
from .mask import MASKS, StepMask, interval_mask, named_mask, scale_mask
from .pab import Broadcast
from .policy import Policy
from .record import POLICIES, PolicyRecord, register_policy
from .seacache import SeaCache, wiener_gain
from .taylorseer import Taylor
from .teacache import TeaCache

__all__ = [
    "MASKS",
    "POLICIES",
    "Accumulated",
    "Broadcast",
    "DBCache",
    "EasyCache",
    "MagCache",
    "Policy",
    "PolicyRecord",
    "SeaCache",
    "StepMask",
    "Taylor",
    "TeaCache",
    "interval_mask",
    "estimated_change",
    "wiener_gain",
    "change_ratio",
    "register_policy",
    "scale_mask",
    "named_mask",
]
