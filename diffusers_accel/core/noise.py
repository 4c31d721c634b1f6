"""The fraction of noise at each step of a schedule, from a scheduler of any family."""

from __future__ import annotations

from typing import Any


def noise_fractions(scheduler: Any) -> list[float] | None:
    """The fraction of noise s / (a + s) in latents a x + s n, at every timestep; `None` for an unknown scheduler.

    Flow matching has a = 1 - s, so its sigmas are the fractions. Sigmas above 1 belong to latents x + sigma n.
    Schedulers that keep no sigmas (DDIM, DDPM) have the squares of a by training timestep. Reads from the device once.
    """
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    if sigmas is not None and len(sigmas) >= len(timesteps):
        values = [float(sigma) for sigma in sigmas.tolist()]
        return values if max(values) <= 1 else [sigma / (1 + sigma) for sigma in values]
    squares = getattr(scheduler, "alphas_cumprod", None)
    if squares is None:
        return None
    found = []
    for square in squares[timesteps.long().cpu()].tolist():
        signal, noise = square**0.5, (1 - square) ** 0.5
        found.append(noise / (signal + noise))
    return found
