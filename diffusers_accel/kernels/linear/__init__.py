"""Linear layers in low-bit formats, one record per format.

Importing this package registers the records and imports no kernel package. Where to look:

- `formats.py`: the definition of each format, in plain torch. `module.py`: the base classes of quantized layers.
  `weight_view.py`: their weight as a lazy tensor.
- `packed.py`: several layers as one product. `sharded.py`: a rank's shard of a layer.
- `record.py`: the record of a format, and `register_linear`.
- `eight_bit.py`, `four_bit.py`: the layers. `third_party.py`: layers of other packages.
- Operators that rewrites of compiled graphs find or insert: `row_quantization.py` (activations, row by row),
  `epilogue.py` (GELU after a GEMM, a concatenation before it), `skinny.py` (skinny GEMMs).
- `precomputed.py`: outputs of a few rows that were computed before a request's first step.
- Triton kernels, imported only when a layer runs on CUDA: `gemm.py`, `quantize_activations.py`,
  `quantize_weights.py`.
"""

from __future__ import annotations

from . import eight_bit, four_bit, third_party  # noqa: F401  (each registers its records)
from .module import STOCK, ActivationCache, CannotPack, LinearProxy, QuantizedLinear
from .packed import LinearSlice, PackedLinear, release_tensors, restore_tensors, stock_modules
from .record import LINEARS, LinearKernel, kind_of, register_linear
from .sharded import is_sharded, stock_of, unsharded_layer

__all__ = [
    "LINEARS",
    "STOCK",
    "CannotPack",
    "LinearKernel",
    "LinearSlice",
    "QuantizedLinear",
    "ActivationCache",
    "PackedLinear",
    "LinearProxy",
    "release_tensors",
    "is_sharded",
    "kind_of",
    "stock_modules",
    "register_linear",
    "stock_of",
    "restore_tensors",
    "unsharded_layer",
]
