"""`python -m diffusers_accel`: the same as the command `diffusers-accel`."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    main()
