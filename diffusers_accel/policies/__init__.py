"""Caching policies: when to skip a step, and how to predict what it would have given. Arithmetic only."""

from .dbcache import DBCache
from .mask import MASKS, StepMask, every, scaled, steps_of
from .policy import Policy
from .taylorseer import Taylor
from .teacache import TeaCache

__all__ = ["MASKS", "DBCache", "Policy", "StepMask", "Taylor", "TeaCache", "every", "scaled", "steps_of"]
