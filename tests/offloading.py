"""What tests of offloading share: the stand-in for a GPU's copies, and a watch over all slots."""

from __future__ import annotations

from contextlib import contextmanager

from transfers import HostTransfers

from diffusers_accel.core.streaming import TRANSFERS, WeightStream


@contextmanager
def on_cpu(monkeypatch, order="late"):
    """Offloading on the CPU, with all transfers that were made. Reads of slots are in their logs."""
    monkeypatch.setattr(HostTransfers, "order", order)
    monkeypatch.setattr(HostTransfers, "made", [])
    monkeypatch.setitem(TRANSFERS, "cpu", HostTransfers)
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
