"""The passes between two matrix products: norms, modulation, gates and activations, and the rounding of their result.

`operators.py` defines them as torch operators, so that a compiled graph can name them, in plain torch where there is no
GPU. `rows.py` has the Triton kernels behind them, which read a row once and hold it in registers.
"""
