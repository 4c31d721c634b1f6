"""SeaCache's rule (https://arxiv.org/abs/2602.18993): changes of the latents' signal are summed, a small sum skips.

The latents have a share of signal a and a share of noise s. A Wiener-like filter keeps the signal of each spatial
frequency f: gain = a P / (a^2 P + s^2), with P = |f|^-power the power spectrum of clean pictures. There is one factor
per axis, and the gains are scaled to a mean of one. Relative L1 changes of the filtered latents are summed over steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accumulated import Accumulated


@dataclass
class SeaCache(Accumulated):
    """The policy of one guidance branch for one request. The module states the rule."""

    max_consecutive: int = 2


def wiener_gain(frequency: float, noise: float, power: float) -> float:
    """The filter's gain at one frequency, before scaling.

    Args:
        frequency: Absolute frequency in cycles per sample, between 0 and 0.5.
        noise: Share of noise s, between 0 and 1. The share of signal is 1 - s.
        power: Exponent of the power spectrum.
    """
    noise = min(max(noise, 1e-6), 1 - 1e-6)
    signal = 1 - noise
    clean = 1 / (frequency**power + 1e-16)
    return signal * clean / (signal**2 * clean + noise**2 + 1e-16)
