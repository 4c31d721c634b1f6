"""SeaCache's rule (https://arxiv.org/abs/2602.18993): sum up the change of the latents' signal, skip while it is small.

At a noise level with signal share a and noise share s, a Wiener-like filter keeps of each spatial frequency f what is
signal: gain = a P / (a^2 P + s^2) with P = |f|^-power, the power spectrum of clean pictures, one factor for each axis,
the whole scaled to a mean of one. The relative L1 change of the filtered latents is summed up over the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accumulated import Accumulated


@dataclass
class SeaCache(Accumulated):
    """One branch of one request. See the module for the rule."""

    most_in_a_row: int = 2


def gain(frequency: float, noise: float, power: float) -> float:
    """What the filter keeps of one frequency.

    Args:
        frequency: Its absolute value, in cycles per sample, between 0 and 0.5.
        noise: Share of noise s, between 0 and 1; the share of signal is 1 - s.
        power: Exponent of the power spectrum.
    """
    noise = min(max(noise, 1e-6), 1 - 1e-6)
    signal = 1 - noise
    clean = 1 / (frequency**power + 1e-16)
    return signal * clean / (signal**2 * clean + noise**2 + 1e-16)
