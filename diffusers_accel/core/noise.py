"""How noisy each step of a schedule is, read off the pipeline's scheduler, whichever family it is of."""

from __future__ import annotations

from typing import Any


def noise_shares(scheduler: Any) -> list[float] | None:
    """The share of noise s / (a + s) of latents a x + s n at every timestep; `None` if the scheduler does not tell.

    Flow matching has a = 1 - s, so its sigmas are the shares. Sigmas above 1 are those of x + sigma n. Schedulers that
    keep no sigmas (DDIM, DDPM) have the squares of a by training timestep. Reads from the device once.
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
