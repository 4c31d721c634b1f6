"""Products of a few rows that are known before they are asked for.

Modulations depend on the time step and the prompt alone, and a request's time steps are known when it begins. Made for
all of them at once, each weight is read once a request instead of once a step; a step copies its rows. An answer is
taken only if the input is, bit for bit, the one it was made for: that is decided on the GPU, where the input is, and
everything else is multiplied as ever. So this can cost time, never a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

# Steps for which there is room are counted in these, so that buffers, which CUDA graphs know by their addresses, stay.
_ROOM = 32


class KnownInputs:
    """The inputs of a request's steps, and which of them is at hand.

    Args:
        rows: (steps, rows, depth): what is given to SiLU and a linear layer at each step.
    """

    def __init__(self, rows: torch.Tensor):
        steps = -(-rows.shape[0] // _ROOM) * _ROOM
        with torch.inference_mode(False):
            self.rows = rows.new_empty((steps, *rows.shape[1:]))
            self.step = torch.full((1,), -1, dtype=torch.int32, device=rows.device)
            self.missed = torch.zeros(1, dtype=torch.int32, device=rows.device)
        self.count = 0

    def fits(self, rows: torch.Tensor) -> bool:
        """Whether there is room for other inputs of the same form."""
        return len(rows) <= len(self.rows)

    def take(self, rows: torch.Tensor) -> None:
        """Takes the inputs of another request; none of them is at hand."""
        self.rows[: len(rows)] = rows
        self.count = len(rows)
        self.missed.zero_()
        self.at(None)

    def at(self, step: int | None) -> None:
        """Says whose turn it is; nobody's, if the place in the request is not known."""
        self.step.fill_(-1 if step is None or not 0 <= step < self.count else step)


@dataclass(eq=False)
class Known:
    """One layer's products.

    Attributes:
        inputs: What they were made from, shared by all layers that read the same.
        products: (steps, rows, out_features).
    """

    inputs: KnownInputs
    products: torch.Tensor

    def plain(self, x: torch.Tensor) -> torch.Tensor | None:
        """The product of SiLU of `x`, (rows, depth), if it is known: in plain torch, reading from the device."""
        step = int(self.inputs.step)
        if step >= 0 and x.dtype == self.inputs.rows.dtype and torch.equal(x, self.inputs.rows[step]):
            return self.products[step]
        self.inputs.missed += 1
        return None


# By the address of a layer's weight; whoever has made them keeps them.
_KNOWN: WeakValueDictionary[int, Known] = WeakValueDictionary()


def known_of(weight: torch.Tensor) -> Known | None:
    """What is known of a layer, by its weight."""
    return _KNOWN.get(weight.data_ptr())


def publish(known: Mapping[int, Known]) -> None:
    """Makes products known, by the addresses of weights, as long as the caller keeps them."""
    _KNOWN.update(known)
