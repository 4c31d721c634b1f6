"""A VAE sharded among ranks decodes and encodes what the stock VAE does, and is the stock VAE again afterwards."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from ranks import decode

from diffusers_accel.core.comm import Group
from diffusers_accel.core.edits import Journal
from diffusers_accel.errors import Unsupported
from diffusers_accel.features.parallel import vae as parallel_vae
from diffusers_accel.features.parallel.vae import idle_ranks

# In float64, where nothing but the order of sums is different: norms over a few channels that are nearly zero here and
# there multiply it. LTX's stock VAE rounds to float32 in between.
CLOSE = 1e-11
ROUNDED = 1e-5


def close(name):
    return ROUNDED if name == "ltx" else CLOSE


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [
        each
        for place, name in enumerate(decode.VAES)
        for each in ((name, 2, "width"), (name, 2 if place % 2 else 4, "height"))
    ],
)
def test_same_as_stock(pools, name, size, dim):
    for found, restored in pools[size].run(decode.errors, name, dim):
        assert len(found) == (6 if size == 2 else 4) and restored
        assert max(found.values()) < close(name), found


@pytest.mark.parametrize(("name", "size"), [("deep kl", 4), ("wan", 2), ("ltx2", 2), ("cosmos", 4)])
def test_over_symmetric_memory(pools, name, size):
    for found, restored in pools[size].run(decode.errors, name, "height", True):
        assert restored and max(found.values()) < CLOSE, found


@pytest.mark.parametrize("name", ["kl", "wan", "ltx2"])
def test_halos_matter(pools, name):
    for found in pools[2].run(decode.broken, name):
        assert min(found.values()) > 1e-3, found


def test_ways_to_call(pools):
    for found in pools[2].run(decode.ways):
        assert max(found.values()) < CLOSE, found


def test_bfloat16(pools):
    """As far from float64 as the stock VAE is: statistics of norms are kept in float32."""
    for stock, found in pools[2].run(decode.halves):
        assert found < 1.2 * stock, (found, stock)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("computing", [1, 2])
@pytest.mark.parametrize("name", ["kl", "wan", "cosmos"])
def test_ranks_that_do_not_compute(pools, name, computing, idle):
    """They receive everything, or zeros for what is decoded, in whatever way the VAE is called."""
    for rank, (found, computed, left) in enumerate(pools[4].run(decode.on_idle_ranks, name, computing, idle)):
        assert computed == (rank < computing) and not left
        for what, error in found.items():
            if idle and "decode" in what and rank >= computing:
                assert error == pytest.approx(1.0, abs=1e-4), what
            else:
                assert error < CLOSE, what


def test_latents_that_are_received(pools):
    """Of a VAE of another kind, which names them otherwise."""
    assert all(max(errors) == 0 for errors in pools[2].run(decode.idle_ranks_latents))


def test_who_waits_hears_of_an_error(pools):
    first, *rest = pools[4].run(decode.idle_ranks_error)
    assert first == "ValueError: no"
    assert all("RuntimeError" in other and "rank 0: ValueError: no" in other for other in rest)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("deaf", [False, True])
def test_it_is_told_and_raised_again(kind, deaf):
    """Ctrl-C too, and whether or not idle ranks can be told."""
    told = []

    class Everyone(Group):
        def all_gather_object(self, value):
            told.append(value)
            if deaf:
                raise RuntimeError("the connection is closed")
            return [value]

    class Vae:
        def decode(self, z):
            raise kind("no")

        encode = decode

    vae, journal = Vae(), Journal()
    journal.apply(idle_ranks.edits(vae, Everyone(None, (0, 1), 0), 1, False, 1))
    with pytest.raises(kind, match="no"):
        vae.decode(torch.zeros(1))
    assert told == [f"{kind.__name__}: no"]


def test_refused_calls(pools):
    for few, odd, tiled in pools[2].run(decode.refused):
        assert "a latent height of 1 is too little for 2 ranks" in few and "AutoencoderKL" in few
        assert "a height of 9 is no multiple of 2" in odd
        assert "tiling is on" in tiled and "disable_tiling" in tiled


def tiling(vae):
    vae.enable_tiling()


def processor(vae):
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())


def circular(vae):
    vae.decoder.conv_in.padding_mode = "circular"


def shrinking(vae):
    vae.decoder.conv_in.padding = (0, 0)


def foreign(vae):
    vae.decoder.conv_act = torch.nn.Softmax2d()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tiling, "tiling is on"),
        (processor, "AttnProcessor"),
        (circular, "decoder.conv_in pads"),
        (shrinking, "decoder.conv_in changes the picture's size"),
        (foreign, "decoder.conv_act is a Softmax2d"),
    ],
)
def test_refused_vaes(change, reason):
    vae = decode.build("kl")
    assert parallel_vae.refuse(vae) is None
    change(vae)
    assert reason in parallel_vae.refuse(vae)
    with pytest.raises(Unsupported, match=reason):
        Journal().apply(parallel_vae.edits(vae, Group(None, (0, 1), 0), "height", 0))
    assert not set(vars(vae)) & {"decode", "encode"}


def test_refused_classes():
    from diffusers import AutoencoderKLLTX2Video, AutoencoderTiny

    assert "AutoencoderKLWan" in parallel_vae.refuse(AutoencoderTiny())
    noisy = AutoencoderKLLTX2Video(
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(True, True),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        latent_channels=4,
    )
    assert "adds noise" in parallel_vae.refuse(noisy)


def test_alone():
    assert list(parallel_vae.edits(decode.build("kl"), Group(None, (0,), 0), "height", 0)) == []
