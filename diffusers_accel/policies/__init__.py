"""Caching policies: when to skip a step, and how to predict what it would have given. Arithmetic only."""

from __future__ import annotations

from .accumulated import Accumulated
from .dbcache import DBCache
from .easycache import EasyCache, foretold, rate
from .magcache import MagCache
from .mask import MASKS, StepMask, every, scaled, steps_of
from .pab import Broadcast
from .policy import Policy
from .record import POLICIES, PolicyRecord, register_policy
from .seacache import SeaCache, gain
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
    "every",
    "foretold",
    "gain",
    "rate",
    "register_policy",
    "scaled",
    "steps_of",
]
