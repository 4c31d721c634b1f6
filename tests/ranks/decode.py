"""Functions that ranks run in tests of `features/parallel/vae`."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from tiny import components, cosmos, flux2, ltx2, others, qwen

from diffusers_accel.core.edits import Journal
from diffusers_accel.core.mesh import Mesh, init_process_group
from diffusers_accel.core.symm_mem import SymmetricMemory
from diffusers_accel.errors import Unsupported
from diffusers_accel.features.parallel import vae as parallel_vae
from diffusers_accel.features.parallel.vae import idle_ranks
from diffusers_accel.features.parallel.vae.strips import Strips

from .shared_memory import SharedFiles

# Channels of the latents.
VAES = {
    "kl": 4, "deep kl": 4, "flux2": 4, "wan": 16, "wan22": 48, "qwen": 4, "ltx2": 4, "deep ltx2": 4, "cosmos": 16,
    "ltx": 8, "cogvideox": 4,
}  # fmt: skip


def _deep_kl():
    """Four levels of several widths, attention among the blocks, and convolutions around the latents."""
    from diffusers import AutoencoderKL

    return components.energise(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
        )
    )


def _deep_ltx2():
    """Every kind of LTX-2's downsampling, patches, and residual upsampling."""
    from diffusers import AutoencoderKLLTX2Video

    return components.energise(
        AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            patch_size=2,
        )
    )


def build(name, dtype=torch.float64):
    """A tiny stock VAE, the same in every process."""
    made = {
        "kl": components.image_vae,
        "deep kl": _deep_kl,
        "flux2": flux2.vae,
        "wan": components.wan_vae,
        "wan22": components.wan22_vae,
        "qwen": qwen.vae,
        "ltx2": ltx2.video_vae,
        "deep ltx2": _deep_ltx2,
        "cosmos": cosmos.cosmos_vae,
        "ltx": lambda: others._ltx().vae,
        "cogvideox": lambda: others._cogvideox().vae,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = made[name]()
    return vae.eval().requires_grad_(False).to(dtype)


def latents(name, rows, columns, batch=1, frames=3):
    """Random latents, the same in every process; frames where the VAE is one for videos."""
    video = () if name in ("kl", "deep kl", "flux2") else (frames,)
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(batch, VAES[name], *video, rows, columns, generator=generator).double()


def group():
    """All ranks as one group."""
    init_process_group("cpu")
    return Mesh({"ulysses": torch.distributed.get_world_size()}, "cpu").group("ulysses")


@contextmanager
def sharded(vae, dim="height", symm_memory=False):
    """Within it, a VAE's work is sharded among all ranks; afterwards nothing may be left of that."""
    journal, everyone = Journal(), group()
    if symm_memory:
        everyone.symm_mem = SymmetricMemory(everyone, SharedFiles)
    journal.apply(parallel_vae.edits(vae, everyone, dim, 0))
    try:
        yield vae
    finally:
        journal.undo()
    left = {"_conv_forward", "forward", "decode", "encode"}
    assert not [path for path, module in vae.named_modules() if left & set(vars(module))]


def parameters(vae, x):
    """The parameters of the distribution of encoded pictures."""
    return vae.encode(x).latent_dist.parameters


@torch.no_grad()
def errors(name, dim, symm_memory=False):
    """Relative errors of what a sharded VAE decodes and encodes, against the stock VAE, by call; and whether the stock
    VAE is the same bit for bit afterwards. `symm_memory`: rows are exchanged through shared memory."""
    vae, ranks, found = build(name), group().size, {}
    # Sizes that do not divide, that leave each rank as little as there can be, and that divide.
    for length in (2 * ranks + 1, ranks, 2 * ranks)[: 3 if ranks == 2 else 2]:
        size = (length, 5) if dim == "height" else (3, length)
        z = latents(name, *size, batch=1 + length % 2)
        sample = vae.decode(z).sample
        moments = parameters(vae, sample)
        with sharded(vae, dim, symm_memory):
            found[f"decode {size}"] = relative(vae.decode(z).sample, sample)
            found[f"encode {size}"] = relative(parameters(vae, sample), moments)
    return found, torch.equal(vae.decode(z).sample, sample) and torch.equal(parameters(vae, sample), moments)


@torch.no_grad()
def broken(name):
    """Relative errors where neighbours' rows never come."""
    stock = Strips.exchange_halos

    def exchange_halos(self, x, halo, zeros=True):
        return tuple(torch.zeros_like(rows) for rows in stock(self, x, halo, zeros))

    Strips.exchange_halos = exchange_halos
    try:
        return errors(name, "height")[0]
    finally:
        Strips.exchange_halos = stock


@torch.no_grad()
def ways():
    """Relative errors of other ways to call the same."""
    vae, found = build("kl"), {}
    z = latents("kl", 5, 4, batch=2)
    sample, part = vae.decode(z).sample, vae.decoder(z[:1])
    whole = vae(sample, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    with sharded(vae):
        found["tuple"] = relative(vae.decode(z, return_dict=False)[0], sample)
        found["by name"] = relative(vae.decode(z=z).sample, sample)
        again = vae(sample, sample_posterior=True, generator=torch.Generator().manual_seed(0))
        found["forward"] = relative(again.sample, whole)
        moments = vae.encode(sample, return_dict=False)[0].mode()
        vae.enable_slicing()
        found["sliced"] = relative(vae.decode(z).sample, sample)
        found["encoded in slices"] = relative(vae.encode(x=sample).latent_dist.mode(), moments)
        # A part of the VAE called by itself is not sharded.
        found["decoder"] = relative(vae.decoder(z[:1]), part)
    return found


@torch.no_grad()
def on_idle_ranks(name, computing, idle):
    """Relative errors by call where the first ranks alone compute, whether this one did, and what is left of it."""
    vae, found, computed, everyone = build(name), {}, [], group()
    mesh = Mesh({"ulysses": everyone.size}, "cpu")
    z = latents(name, 5, 4, batch=2)
    sample = vae.decode(z).sample
    moments = parameters(vae, sample)
    hook = vae.decoder.register_forward_pre_hook(lambda *_: computed.append(True))
    journal = Journal()
    journal.apply(parallel_vae.edits(vae, mesh.consecutive(computing), "height", 0))
    journal.apply(idle_ranks.edits(vae, everyone, computing, idle, 1))
    found["decode"] = relative(vae.decode(z).sample, sample)
    found["decode, tuple"] = relative(vae.decode(z, return_dict=False)[0], sample)
    found["decode, by name"] = relative(vae.decode(z=z).sample, sample)
    found["encode"] = relative(parameters(vae, sample), moments)
    found["encode, tuple"] = relative(vae.encode(sample, return_dict=False)[0].parameters, moments)
    journal.undo()
    hook.remove()
    return found, bool(computed), {"decode", "encode"} & set(vars(vae))


@torch.no_grad()
def idle_ranks_latents():
    """Relative errors where the first rank alone computes, of a VAE whose encoder gives latents and no distribution."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
             "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "upsampling_scaling_factor": 2}  # fmt: skip
    vae, x, everyone = AutoencoderTiny(**small).eval(), torch.rand(1, 3, 16, 16), group()
    encoded = vae.encode(x).latents
    sample = vae.decode(encoded).sample
    journal = Journal()
    journal.apply(idle_ranks.edits(vae, everyone, 1, False, 1))
    found = relative(vae.encode(x).latents, encoded), relative(vae.decode(encoded).sample, sample)
    journal.undo()
    return found


def idle_ranks_error():
    """The error of each rank where the first one fails."""
    vae, everyone = build("kl"), group()
    if everyone.rank == 0:

        def decode(z):
            raise ValueError("no")

        vae.decode = decode
    journal = Journal()
    journal.apply(idle_ranks.edits(vae, everyone, 1, False, 1))
    try:
        vae.decode(latents("kl", 5, 4))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        journal.undo()


@torch.no_grad()
def halves():
    """Relative errors in bfloat16 against float64: of the stock VAE, and of the sharded one."""
    vae, z = build("deep kl"), latents("deep kl", 6, 6)
    exact = vae.decode(z).sample
    vae, z = vae.to(torch.bfloat16), z.to(torch.bfloat16)
    stock = vae.decode(z).sample
    with sharded(vae):
        found = vae.decode(z).sample
    assert found.dtype == torch.bfloat16
    return relative(stock.double(), exact), relative(found.double(), exact)


@torch.no_grad()
def refused():
    """Messages of refused calls: too few rows, no whole latents, tiling switched on since."""
    vae, found = build("kl"), []
    few, tall = latents("kl", 1, 4), torch.zeros(1, 3, 9, 8)

    def refusal(function, *args):
        try:
            function(*args)
        except Unsupported as error:
            found.append(str(error))

    with sharded(vae):
        refusal(vae.decode, few)
        refusal(vae.encode, tall)
        vae.enable_tiling()
        refusal(vae.decode, latents("kl", 4, 4))
        vae.disable_tiling()
        assert vae.decode(latents("kl", 4, 4)).sample.shape == (1, 3, 8, 8)
    return found


def relative(found, expected):
    """The relative error."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())
