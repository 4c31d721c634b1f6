"""Set-up of tests of offloading: the stand-in for a GPU's copies, and a log of every read of a slot."""

from __future__ import annotations

from contextlib import contextmanager

from transfers import HostTransfers

from diffusers_accel.core.streaming import TRANSFERS, WeightStream
from diffusers_accel.features.offload import planning


@contextmanager
def on_cpu(monkeypatch, order="late", vae=False):
    """Offloading on the CPU, with all transfers that were made. Reads of slots are in their logs.

    Args:
        monkeypatch: pytest's.
        order: When copies are made: `"early"` or `"late"`.
        vae: Whether peaks of VAEs are predicted.
    """
    monkeypatch.setattr(HostTransfers, "order", order)
    monkeypatch.setattr(HostTransfers, "made", [])
    monkeypatch.setitem(TRANSFERS, "cpu", HostTransfers)
    if not vae:
        # A prediction takes longer than a tiny pipeline; test_offload_vae.py has them.
        monkeypatch.setattr(planning, "estimate", lambda *_: {"whole": 0})
    before, after = WeightStream.before, WeightStream.after

    def read(stream, block):
        stream.transfers.read(stream._slots[block.slot].memory.untyped_storage().data_ptr())

    def reads_begin(stream, block):
        before(stream, block)
        read(stream, block)

    def reads_end(stream, block):
        read(stream, block)
        after(stream, block)

    monkeypatch.setattr(WeightStream, "before", reads_begin)
    monkeypatch.setattr(WeightStream, "after", reads_end)
    yield HostTransfers.made
    assert not [race for made in HostTransfers.made for race in made.races()]
