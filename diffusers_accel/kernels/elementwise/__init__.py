"""What stands between two products: norms, modulation, gates and activations, and the rounding of their result.

`operators.py` has them as torch operators, so that a compiled graph can name them, with plain torch where there is no
GPU; `rows.py` the Triton kernels beneath, which read a row once and hold it in registers.
"""
