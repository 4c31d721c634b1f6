"""Ways of decoding: predicted bytes against real tensors and by hand, the choice of a way, switches for one call."""

from __future__ import annotations

import itertools
import json
import warnings
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from tiny import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_accel.core.edits import AddLayer
from diffusers_accel.features.offload import vae as offload_vae
from diffusers_accel.features.offload.vae import AS_SET, DecodeChoice, estimate, predicted_bytes, ways

# A pipeline with each kind of VAE, and the latents of two samples that are larger than the small tiles below.
LATENTS = {
    "flux": (2, 4, 44, 37),
    "flux2": (2, 4, 44, 37),
    "sd3": (2, 4, 44, 37),
    "wan": (2, 16, 4, 11, 9),
    "wan-ti2v": (2, 48, 2, 7, 5),
    "qwen": (2, 4, 2, 11, 9),
    "ltx2": (2, 4, 20, 40, 36),
    "ltx": (2, 8, 10, 18, 17),
    "cosmos": (2, 16, 3, 11, 9),
    "cogvideox": (2, 4, 3, 20, 18),
}
FLUX = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
LTX2 = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
# Real configurations, and the latents of a usual request.
REAL = {
    "AutoencoderKL": (FLUX, (1, 16, 128, 128)),
    "AutoencoderKLFlux2": ({}, (1, 32, 128, 128)),
    "AutoencoderKLQwenImage": ({}, (1, 16, 1, 166, 166)),
    "AutoencoderKLWan": ({}, (1, 16, 21, 60, 104)),
    "AutoencoderKLLTX2Video": (LTX2, (1, 128, 16, 16, 24)),
}
GIB = 2**30
SIDES = ("height", "width")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(offload_vae, "_TILE", 64)


def on_meta(name):
    settings, shape = REAL[name]
    with torch.device("meta"):
        return getattr(diffusers, name)(**settings), shape


def state(module):
    """Everything that decoding could change: plain attributes, and the values of parameters and buffers."""
    plain = {name: value for name, value in vars(module).items() if not isinstance(value, (dict, set))}
    return plain, {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


class RealBytes(TorchDispatchMode):
    """The peak of real memory: after each operator, the sum of all allocations that operators made and that live."""

    def __init__(self, *known):
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self._storages += [weakref.ref(storage) for storage in made]
        self._storages = [each for each in self._storages if each() is not None]
        alive = {each().data_ptr(): each().nbytes() for each in self._storages}
        self.peak = max(self.peak, sum(size for place, size in alive.items() if place not in self._known))
        return out


def really(vae, method, x):
    """The peak bytes of a call, as real tensors take them."""
    with torch.no_grad(), RealBytes(x, *vae.parameters(), *vae.buffers()) as counter:
        getattr(vae, method)(x, return_dict=False)
    return counter.peak


# --- the prediction --------------------------------------------------------------------------------------------------


class SmallVAE(ModelMixin, ConfigMixin):
    """A decoder of two convolutions, whose peak can be worked out by hand."""

    @register_to_config
    def __init__(self, latent_channels=4):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1)
        )

    def decode(self, z, return_dict=True):
        out = self.decoder(z)
        return DecoderOutput(sample=out) if return_dict else (out,)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_peak_that_was_worked_out_by_hand(dtype, size):
    """The last convolution reads 8 channels of four times the latents' pixels, and writes 3."""
    vae = SmallVAE()
    assert ways(vae) == ["whole"]
    assert predicted_bytes(vae, (1, 4, 16, 24), dtype, "whole") == size * (8 + 3) * (4 * 16 * 24)
    assert predicted_bytes(vae, (3, 4, 16, 24), dtype, "whole") == 3 * size * (8 + 3) * (4 * 16 * 24)


def test_the_peak_of_flux_by_hand():
    """At full size, the input of the last block's first norm has 256 channels; its norm and its activation live too."""
    vae, shape = on_meta("AutoencoderKL")
    by_hand = 3 * 256 * 1024 * 1024 * 2
    assert predicted_bytes(vae, shape, torch.bfloat16, "whole") == pytest.approx(by_hand, rel=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LATENTS)
def test_decode_takes_the_predicted_bytes(name, small_tiles):
    vae, shape = build(name).vae, LATENTS[name]
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for way in ways(vae, shape[0]):
        choice = DecodeChoice(vae, way=way)
        layer = AddLayer(vae, 0, choice.around_decode, "decode")
        layer.apply()
        assert predicted_bytes(vae, shape, z.dtype, way) == really(vae, "decode", z), way
        assert choice.taken == {"decode": way}
        layer.undo()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["flux", "wan", "wan-ti2v", "qwen", "ltx2"])
def test_encode_takes_the_predicted_bytes(name, small_tiles):
    vae = build(name).vae
    shape = {"flux": (2, 3, 88, 74), "ltx2": (2, 3, 25, 96, 80)}.get(name, (2, 3, 13, 96, 80))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for way in ways(vae, shape[0]):
        layer = AddLayer(vae, 0, DecodeChoice(vae, way=way).around_encode, "encode")
        layer.apply()
        assert predicted_bytes(vae, shape, x.dtype, way, method="encode") == really(vae, "encode", x), way
        layer.undo()


@pytest.mark.thorough
@pytest.mark.parametrize("name", REAL)
def test_later_ways_need_less_at_real_sizes(name):
    vae, shape = on_meta(name)
    needed = [predicted_bytes(vae, shape, torch.bfloat16, way) for way in ways(vae)]
    assert all(later < 0.9 * before for before, later in itertools.pairwise(needed))
    wide = [predicted_bytes(vae, shape, torch.float32, way) for way in ways(vae)]
    assert all(1.8 * half < full <= 2.1 * half for half, full in zip(needed, wide, strict=True))


def test_slices_need_as_much_as_one_sample_and_the_output():
    vae, shape = on_meta("AutoencoderKL")
    one = predicted_bytes(vae, shape, torch.bfloat16, "whole")
    picture = 3 * 1024 * 1024 * 2
    found = predicted_bytes(vae, (4, *shape[1:]), torch.bfloat16, "slices")
    assert one + 2 * picture <= found <= one + 8 * picture


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2"])
def test_a_prediction_touches_nothing(name):
    vae, shape = build(name).vae, LATENTS[name]
    z = torch.randn(shape)
    with torch.no_grad():
        expected = vae.decode(z, return_dict=False)[0]
    before, random = state(vae), torch.get_rng_state()
    offload_vae._predicted.cache_clear()
    with torch.inference_mode():
        for way in ways(vae, shape[0]):
            assert predicted_bytes(vae, shape, torch.bfloat16, way) > 0
    assert_same(state(vae), before)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(vae.decode(z, return_dict=False)[0], expected)


def test_equal_questions_are_answered_once(monkeypatch):
    vae, other, built = SmallVAE(), SmallVAE(), []
    stock = SmallVAE.from_config.__func__
    monkeypatch.setattr(SmallVAE, "from_config", classmethod(lambda *args: built.append(1) or stock(*args)))
    offload_vae._predicted.cache_clear()
    first = predicted_bytes(vae, (1, 4, 8, 8), torch.float32, "whole")
    assert predicted_bytes(other, [1, 4, 8, 8], torch.float32, "whole") == first and len(built) == 1
    assert predicted_bytes(SmallVAE(8), (1, 8, 8, 8), torch.float32, "whole") == first and len(built) == 2
    assert predicted_bytes(vae, (1, 4, 8, 16), torch.float32, "whole") == 2 * first and len(built) == 3


# --- the ways --------------------------------------------------------------------------------------------------------


def test_ways():
    flux, ltx2 = build("flux").vae, build("ltx2").vae
    assert ways(flux) == ["whole", "tiles"] and ways(flux, 2) == ["whole", "slices", "tiles"]
    assert ways(ltx2, 2) == ["whole", "slices", "tiles"]
    ltx2.register_to_config(timestep_conditioning=True)
    assert ways(ltx2, 2) == ["whole", "tiles"]
    flux.enable_slicing()
    assert ways(flux, 2) == ["whole", "tiles"]
    flux.enable_tiling()
    assert ways(flux, 2) == [AS_SET]


@pytest.mark.parametrize("ratio", [2, 8, 16, 32])
def test_tiles_overlap_by_a_quarter_and_the_last_is_not_narrow(ratio):
    for side in range(512 + ratio, 4096, ratio):
        stride = offload_vae._stride([side], 512, ratio)
        starts = range(0, side, stride)
        assert stride % ratio == 0 and 256 <= stride <= 384
        # A few sides just above three quarters of a tile more have no better stride.
        assert side - starts[-1] >= 128, (side, stride)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_tiles_of_a_decoder_without_context_are_the_whole(name):
    """A decoder that looks at single latents decodes the same in tiles, wherever they are cut and blended."""

    class Pointwise(nn.Module):
        def __init__(self, stock):
            super().__init__()
            self.video = name == "wan"
            self.calls = 0

        def forward(self, z, feat_cache=None, feat_idx=None, first_chunk=False):
            self.calls += 1
            scale = 8 if self.video else 2
            return z[:, :3].repeat_interleave(scale, -1).repeat_interleave(scale, -2).tanh()

    vae = build(name).vae
    vae.decoder = Pointwise(vae.decoder)
    if name == "wan":
        vae.post_quant_conv = nn.Identity()
    ratio = 8 if name == "wan" else 2
    for height, width in ((512, 784), (640, 1024), (832, 480), (1328, 528)):
        shape = [1, vae.config.get("z_dim") or 4, height // ratio, width // ratio]
        if name == "wan":
            shape.insert(2, 2)
        z = torch.randn(shape)
        expected = vae.decode(z, return_dict=False)[0]
        vae.decoder.calls = 0
        found = DecodeChoice(vae, way="tiles").around_decode(vae.decode, z, return_dict=False)[0]
        assert vae.decoder.calls > 2, "the picture was not tiled"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LATENTS)
def test_parts_decode_nearly_the_same(name, small_tiles):
    """Tiles see other means and borders, so pixels differ; a wrong place or size would leave nothing in common."""
    vae, shape = build(name).vae, LATENTS[name]
    # Smooth, as latents are.
    coarse = torch.randn(*shape[:2], *(4 for _ in shape[2:]), generator=torch.Generator().manual_seed(0))
    z = nn.functional.interpolate(coarse, shape[2:], mode="trilinear" if len(shape) == 5 else "bilinear")
    with torch.no_grad():
        whole = vae.decode(z, return_dict=False)[0]
        for way in ways(vae, shape[0])[1:]:
            found = DecodeChoice(vae, way=way).around_decode(vae.decode, z, return_dict=False)[0]
            assert found.shape == whole.shape
            common = torch.corrcoef(torch.stack([found.flatten(), whole.flatten()]))[0, 1]
            assert common > (0.5 if way == "tiles" else 0.9), (way, common)


def test_sides_with_strides_of_their_own():
    """Height 480 takes one tile, width 832 three; both at least 512 pixels, and a quarter of them overlaps."""
    vae = build("wan").vae
    decode, calls = recorded(vae, [f"tile_sample_{kind}_{side}" for kind in ("min", "stride") for side in SIDES])
    DecodeChoice(vae, way="tiles").around_decode(decode, torch.zeros(1, 16, 1, 60, 104))
    height, width, down, right = calls[0].values()
    assert height == width == 512 and down >= 480 and 832 / 3 <= right <= 384


# --- the choice ------------------------------------------------------------------------------------------------------


def recorded(vae, names):
    """A function in the place of `decode` that notes the VAE's switches."""
    calls = []

    def decode(z, return_dict=True):
        calls.append({name: getattr(vae, name) for name in names})
        return z

    return decode, calls


def test_the_first_way_that_fits():
    vae, shape = build("flux").vae, (2, 4, 300, 280)
    decode, calls = recorded(vae, ["use_slicing", "use_tiling", "tile_sample_min_size", "tile_overlap_factor"])
    whole, slices, tiles = (predicted_bytes(vae, shape, torch.float32, way) for way in ("whole", "slices", "tiles"))
    assert whole > slices > tiles
    free = [None]
    choice = DecodeChoice(vae, lambda _: free[0])
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for free[0] in (None, whole, whole - 1, slices, slices - 1, tiles):
            choice.around_decode(decode, torch.zeros(shape))
            taken.append(choice.taken["decode"])
    assert taken == ["whole", "whole", "slices", "slices", "tiles", "tiles"]
    assert [(call["use_slicing"], call["use_tiling"]) for call in calls] == [
        *[(False, False)] * 2, *[(True, False)] * 2, *[(True, True)] * 2,
    ]  # fmt: skip
    assert calls[-1]["tile_sample_min_size"] == 512 and calls[-1]["tile_overlap_factor"] >= 0.25


def test_nothing_fits():
    vae, shape = build("flux").vae, (1, 4, 300, 280)
    decode, calls = recorded(vae, ["use_tiling"])
    choice = DecodeChoice(vae, lambda _: 2**20)
    needed = predicted_bytes(vae, shape, torch.float32, "tiles") / GIB
    with pytest.warns(UserWarning, match=rf"needs {needed:.2f} GiB .*'tiles'.*0\.00 GiB are free.*offload\.vram"):
        choice.around_decode(decode, torch.zeros(shape))
    assert choice.taken == {"decode": "tiles"} and calls == [{"use_tiling": True}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.around_decode(decode, torch.zeros(shape))


def test_a_way_that_did_not_fit_after_all():
    """Free memory in pieces: the call begins again in the next way, and that shape never tries the first one again."""
    vae, shape = build("wan").vae, (1, 16, 2, 80, 80)
    ran, cleared = [], []
    vae.clear_cache = lambda: cleared.append(True)

    def decode(z):
        ran.append(vae.use_tiling)
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return z

    choice = DecodeChoice(vae, lambda _: 2**40)
    with pytest.warns(UserWarning, match="begins again in another way"):
        choice.around_decode(decode, torch.zeros(shape))
    assert ran == [False, True] and cleared and choice.taken == {"decode": "tiles"} and not vae.use_tiling
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.around_decode(decode, torch.zeros(shape))
    assert ran == [False, True, True]

    def never(z):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for choice in (DecodeChoice(vae), DecodeChoice(vae, way="whole"), DecodeChoice(vae, lambda _: 0)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*begins again")
            with pytest.raises(torch.OutOfMemoryError):
                choice.around_decode(never, torch.zeros(shape))


def test_encode_is_chosen_by_its_own_prediction():
    vae, shape = build("flux").vae, (1, 3, 600, 560)
    needed = [predicted_bytes(vae, shape, torch.float32, way, method="encode") for way in ("whole", "tiles")]
    choice = DecodeChoice(vae, lambda _: needed[0] - 1)
    encode, calls = recorded(vae, ["use_tiling"])
    choice.around_encode(encode, torch.zeros(shape))
    assert choice.taken == {"encode": "tiles"} and calls == [{"use_tiling": True}]


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2"])
def test_switches_come_back(name):
    vae = build(name).vae
    before = state(vae)
    z = torch.zeros(LATENTS[name])

    def interrupted(z):
        assert vae.use_tiling
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            DecodeChoice(vae, way="tiles").around_decode(interrupted, z)
        assert_same(state(vae), before)
    DecodeChoice(vae, way="tiles").around_decode(lambda z: z, z)
    assert_same(state(vae), before)


def test_a_users_switches_stay():
    vae = build("wan").vae
    vae.enable_tiling(tile_sample_min_height=96, tile_sample_stride_height=64)
    before = state(vae)
    decode, calls = recorded(vae, ["use_tiling", "tile_sample_min_height", "tile_sample_stride_height"])
    for choice in (DecodeChoice(vae, lambda _: 1), DecodeChoice(vae, way="whole"), DecodeChoice(vae, way="tiles")):
        choice.around_decode(decode, torch.zeros(LATENTS["wan"]))
        assert choice.taken == {"decode": AS_SET}
    assert all(list(call.values()) == [True, 96, 64] for call in calls)
    assert_same(state(vae), before)
    vae.disable_tiling()
    vae.enable_slicing()
    decode, calls = recorded(vae, ["use_slicing"])
    DecodeChoice(vae).around_decode(decode, torch.zeros(LATENTS["wan"]))
    assert calls == [{"use_slicing": True}]


def test_a_fixed_way_that_a_call_does_not_have():
    vae = build("flux").vae
    choice = DecodeChoice(vae, way="slices")
    for batch, taken in ((1, "whole"), (2, "slices")):
        choice.around_decode(lambda z: z, torch.zeros(batch, 4, 8, 8))
        assert choice.taken == {"decode": taken}


class Unpredictable(SmallVAE):
    def decode(self, z, return_dict=True):
        return super().decode(z * z.sum().item(), return_dict)


def test_a_vae_that_cannot_be_predicted():
    vae = Unpredictable()
    vae.use_tiling = False
    choice = DecodeChoice(vae, lambda _: 10)
    with pytest.warns(UserWarning, match=r"Unpredictable\.decode cannot be predicted"):
        assert choice.around_decode(lambda z: z + 1, torch.zeros(1, 4, 8, 8)).sum() == 256
    assert choice.taken == {"decode": "whole"}
    pipe = build("flux")
    pipe.vae = vae
    with pytest.warns(UserWarning, match=r"Unpredictable\.decode cannot be predicted"):
        assert estimate(pipe, (1, 8, 8)) == {"whole": 0}


def test_peaks_of_a_gpu():
    """Predictions are within 15% of the peaks that were measured on a GPU."""
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "memory-vae.json").read_text())
    kinds = {"FLUX.1": "AutoencoderKL", "Qwen-Image": "AutoencoderKLQwenImage", "Wan2.1": "AutoencoderKLWan"}
    kinds["LTX-2"] = "AutoencoderKLLTX2Video"
    checked = 0
    for call, figures in measured.items():
        name, _, rest = call.partition(", (")
        if name not in kinds:
            continue
        shape, _, way = rest.partition("), ")
        with torch.device("meta"):
            vae = getattr(diffusers, kinds[name])(**(FLUX if name == "FLUX.1" else {}))
        size = tuple(int(side) for side in shape.split(", "))
        found = predicted_bytes(vae, size, torch.bfloat16, way, workspaces=True) / GIB
        assert found == pytest.approx(figures["measured"], rel=0.15), call
        checked += 1
    assert checked == 10


# --- the planner's estimate ------------------------------------------------------------------------------------------


def test_estimate():
    pipe = build("flux")
    found = estimate(pipe, (1, 300, 280))
    expected = {way: predicted_bytes(pipe.vae, (1, 4, 300, 280), torch.float32, way) for way in ("whole", "tiles")}
    assert found == expected and list(found) == ["whole", "tiles"]
    on_gpu = estimate(pipe, (1, 300, 280), torch.device("cuda"))
    assert all(on_gpu[way] > needed for way, needed in found.items())
    # A picture that is no larger than a tile.
    assert list(estimate(pipe, (1, 64, 64))) == ["whole"]
    pipe.vae.enable_tiling()
    assert list(estimate(pipe, (1, 300, 280))) == [AS_SET]
    video = build("ltx2")
    found = estimate(video, (80, 16, 16))
    assert found["whole"] == predicted_bytes(video.vae, (1, 4, 80, 16, 16), torch.float32, "whole")
    pipe.vae = None
    assert estimate(pipe, (1, 8, 8)) == {"whole": 0}


def test_estimate_of_a_vae_that_its_pipeline_upcasts():
    pipe = build("sdxl")
    pipe.vae.to(torch.float16)
    shape = (1, pipe.vae.config.latent_channels, 32, 32)
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        pipe.vae.register_to_config(force_upcast=upcast)
        assert estimate(pipe, (1, 32, 32))["whole"] == predicted_bytes(pipe.vae, shape, dtype, "whole")
