"""Linear layers in low-bit formats: one record each.

Importing this package registers the records and imports no kernel package. Where to look:

- `formats.py`: what each format is, in plain torch. `module.py`: what every quantized layer has in common.
- `stacked.py`: several layers as one product. `sharded.py`: layers of which a rank has a part.
- `record.py`: what a linear kernel is, and `register_linear`.
- `eight_bit.py`, `four_bit.py`: the layers. `others.py`: those of packages a user may have.
- Operators that rewrites of compiled graphs find or put there: `rounding.py` (activations, row by row), `epilogue.py`
  (GELU in a product, a product of parts), `narrow.py` (a few rows).
- In Triton, imported only when a layer runs on a CUDA device: `activations.py`, `products.py`, `weights.py`.
"""

from __future__ import annotations

from . import eight_bit, four_bit, others  # noqa: F401  (each registers its records)
from .module import STOCK, Apart, QuantizedLinear, RoundedOnce, StandIn
from .record import LINEARS, LinearKernel, kind_of, register_linear
from .sharded import is_sharded, stock_of, unsharded_layer
from .stacked import Part, Stack, emptied, modules_of, unstacked

__all__ = [
    "LINEARS",
    "STOCK",
    "Apart",
    "LinearKernel",
    "Part",
    "QuantizedLinear",
    "RoundedOnce",
    "Stack",
    "StandIn",
    "emptied",
    "is_sharded",
    "kind_of",
    "modules_of",
    "register_linear",
    "stock_of",
    "unstacked",
    "unsharded_layer",
]
