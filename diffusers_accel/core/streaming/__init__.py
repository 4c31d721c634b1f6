"""Streaming of weights: blocks whose weights lie in host memory and are copied to the GPU just before they run.

The master copy of a block's weights is its *slab*: one buffer of page-locked host memory. On the GPU there are a few
*slots*, buffers at fixed addresses. A block is copied into its slot, always the same one, while earlier blocks compute.
All copies are on one stream, and ordered against computation by events. The host waits for nothing, and nothing is
copied back.

Outside of its model's forward, a block's tensors are the slab itself, read by the GPU over the bus
(`host_memory.LockedBuffer.on_device`). Everything that reads or writes weights (saving, LoRA layers and merges, moves)
therefore works on the master copy. Within the forward, views of the slots take the tensors' places. Each block's views
never change, so compiled code sees no change, and CUDA graphs stay valid.

A CUDA graph records the copies of its blocks as nodes beside the kernels (`slots.RecordedCopies`). Events that a graph
records, and waits for, as nodes order it against the copies outside of it: no copy waits for a whole graph.

- `transfers.py`: the seam between streaming and a device.
- `blocks.py`: one block's tensors and its slab.
- `slots.py`: the slots, the copies into them, and CUDA graphs.
- `models.py`: the layers around a model and its blocks.
- `edits.py`: the edits that begin and end it.
"""

from __future__ import annotations

from .blocks import StreamedBlock, StreamedTensor, can_stream, parts_of
from .edits import MoveWeight, OffloadBlock, OpenSlots, Slabs
from .models import StreamedModel
from .slots import RecordedCopies, StreamCounts, WeightStream
from .transfers import TRANSFERS, CudaTransfers, Slab, Transfers

__all__ = [
    "TRANSFERS",
    "CudaTransfers",
    "MoveWeight",
    "OffloadBlock",
    "OpenSlots",
    "RecordedCopies",
    "Slab",
    "Slabs",
    "StreamCounts",
    "StreamedBlock",
    "StreamedModel",
    "StreamedTensor",
    "Transfers",
    "WeightStream",
    "can_stream",
    "parts_of",
]
