"""Caching policies: when to skip a step. Arithmetic only."""

from .policy import Policy
from .teacache import TeaCache

__all__ = ["Policy", "TeaCache"]
