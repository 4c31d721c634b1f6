"""Low-bit formats of weights and activations: how numbers become stored values and scales, and back. Plain torch.

Every function here is the definition of its format: the Triton kernels and the GPU's own matrix units are tested
against these, and these against independent float64 arithmetic. Scales are float32 (a block scale of NVFP4 is e4m3),
and what is stored times its scale is the number again.

- e4m3 (`fp8`): 1 sign, 4 exponent, 3 mantissa bits, largest 448 (https://arxiv.org/abs/2209.05433). One scale per
  tensor, per row, or per block of 128 x 128 weights and 1 x 128 activations.
- INT8, symmetric, -127 to 127, one scale per row.
- NVFP4: e2m1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6), an e4m3 scale for every 16 of a row and one float32 scale for all.
  Two values lie in a byte, the first of a pair in the low bits, as NVIDIA ModelOpt packs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
BLOCK = 128
GROUP = 16
# Midpoints between neighbouring magnitudes of e2m1; at an exact midpoint the value with the even code is taken.
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def scale_of(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale that takes `amax` to a type's largest value, float32; 1 where there is nothing but zeros."""
    scale = amax.float() / largest
    # A magnitude so small that its scale is no normal number is taken for zero's neighbour: nothing is divided by 0.
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest e4m3; what is larger than 448 becomes 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest integer from -127 to 127, ties to even."""
    return x.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


# --- e4m3 and INT8 ----------------------------------------------------------------------------------------------------


def in_slices(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor, most: int = 2**24
) -> tuple[torch.Tensor, ...]:
    """What a format makes of slices of rows, joined again: the float32 values in between take little memory.

    Args:
        quantize: Takes rows and returns tensors with rows, each row or block of 128 rows by itself.
        x: (rows, columns).
        most: Values of a slice, about.
    """
    rows = max(1, most // x.shape[1] // BLOCK) * BLOCK
    parts = [quantize(part) for part in x.split(rows)]
    if len(parts) == 1:
        return parts[0]
    # Bytes are joined: not every operation knows the low-bit types.
    return tuple(
        torch.cat([item.view(torch.uint8) for item in items]).view(items[0].dtype) for items in zip(*parts, strict=True)
    )


def tensor_scale(x: torch.Tensor, largest: float = E4M3_MAX) -> torch.Tensor:
    """The scale of a whole tensor, float32 (1,)."""
    low, high = x.aminmax()
    return scale_of(torch.maximum(high.float(), -low.float()), largest).reshape(1)


def quantize_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale: (same shape), float32 (1,)."""
    scale = tensor_scale(x)
    return to_e4m3(x.float() / scale), scale


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 or int8 with one scale per row: (rows, columns), float32 (rows, 1)."""
    int8 = dtype == torch.int8
    scale = scale_of(x.abs().amax(1, keepdim=True), INT8_MAX if int8 else E4M3_MAX)
    scaled = x.float() / scale
    return (to_int8(scaled) if int8 else to_e4m3(scaled)), scale


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale per 128 columns of a row: (rows, columns), float32 (rows, columns / 128). The last group may
    be shorter."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scale = scale_of(padded.abs().amax(-1), E4M3_MAX)
    return to_e4m3(padded / scale[..., None]).view(rows, -1)[:, :columns].contiguous(), scale


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale per block of 128 x 128: (rows, columns), float32 (rows / 128, columns / 128). Blocks at the
    edges may be smaller."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = scale_of(tiles.abs().amax((1, 3)), E4M3_MAX)
    values = to_e4m3(tiles / scale[:, None, :, None]).view(padded.shape)
    return values[:rows, :columns].contiguous(), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 values of any of the above, told apart by the shape of `scale`: (1,), (rows, 1) or blocks."""
    rows, columns = values.shape
    x = values.float()
    if scale.numel() == 1:
        return x * scale.reshape(())
    if scale.shape == (rows, 1):
        return x * scale
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(BLOCK, 0)[:rows]
    return x * scale.repeat_interleave(BLOCK, 1)[:, :columns]


# --- NVFP4 ------------------------------------------------------------------------------------------------------------


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest e2m1 values, uint8 from 0 to 15: three bits of magnitude, the sign above them."""
    magnitude = x.abs()
    midpoints = torch.tensor(_E2M1_MIDPOINTS, dtype=x.dtype, device=x.device)
    # A midpoint goes to the even code: down from an even one to its upper neighbour's midpoint, up from an odd one.
    code = torch.bucketize(magnitude, midpoints)
    up = torch.bucketize(magnitude, midpoints, right=True)
    code = torch.where(code % 2 == 1, up, code)
    return (code + 8 * (x < 0)).to(torch.uint8)


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of codes."""
    values = torch.tensor(_E2M1_VALUES + tuple(-value for value in _E2M1_VALUES), device=codes.device)
    return values[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte: (rows, columns) -> uint8 (rows, columns / 2)."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, columns / 2) -> codes (rows, columns)."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed values uint8 (rows, columns / 2), block scales e4m3 (rows, columns / 16), global scale float32 (1,).

    Args:
        x: (rows, columns), columns a multiple of 16.
        global_scale: To be used instead of the one that takes the largest block scale to 448.
    """
    rows, columns = x.shape
    if columns % GROUP:
        raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} values, not {columns}.")
    groups = x.float().view(rows, -1, GROUP)
    amax = groups.abs().amax(-1)
    if global_scale is None:
        global_scale = scale_of(amax.amax(), E2M1_MAX * E4M3_MAX).reshape(1)
    block_scale = nvfp4_scales(amax, global_scale)
    each = block_scale.float() * global_scale
    # A block far smaller than the largest may round to scale 0: its values are 0.
    scaled = torch.where(each[..., None] == 0, torch.zeros_like(groups), groups / each[..., None])
    return pack(to_e2m1(scaled).view(rows, columns)), block_scale, global_scale


def nvfp4_scales(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, e4m3 (rows, columns / 16), from the blocks' largest magnitudes."""
    block_scale = to_e4m3(scale_of(amax, E2M1_MAX) / global_scale)
    # A block without any value but zero keeps the scale 1, as ModelOpt writes it.
    return torch.where(amax == 0, torch.ones_like(amax), block_scale.float()).to(torch.float8_e4m3fn)


def dequantize_nvfp4(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """float32 (rows, columns); the global scale may be one for each row, (rows, 1)."""
    values = from_e2m1(unpack(packed)).view(packed.shape[0], -1, GROUP)
    return (values * (block_scale.float() * global_scale)[..., None]).flatten(1)


def swizzled(block_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, (rows, columns / 16), in the order Blackwell's matrix units read them
    (https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout): flat, in tiles of 128 rows by four
    scales; within a tile, scale c of row r lies at 16 (r mod 32) + 4 (r div 32) + c. Tiles at the edges are filled up
    with zeros."""
    rows, columns = block_scale.shape
    wide = torch.nn.functional.pad(block_scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = wide.view(wide.shape[0] // 128, 4, 32, wide.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(block_scale.dtype)


# --- low-rank branch --------------------------------------------------------------------------------------------------


def low_rank(
    x: torch.Tensor, rank: int, iterations: int = 3, start: torch.Tensor | None = None, spare: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a rank, nearly: float32 (rows, rank) and (rank, columns), whose product it is.

    Randomized subspace iteration (https://arxiv.org/abs/0909.4061) from a fixed start: the same matrix gives the same
    factors on one kind of device. Bases are made orthogonal by the Cholesky factor of their small Gram matrix, which
    costs a GPU far less than factoring a tall one.

    Args:
        x: (rows, columns).
        rank: At most this.
        iterations: Multiplications by x and its transpose.
        start: Directions to start from, (n, columns), instead of random ones alone.
        spare: Directions beyond the rank to search in, of which the best are taken. None saves the choice among them.
    """
    generator = torch.Generator().manual_seed(0)
    x = x.float()
    rank = min(rank, *x.shape)
    width = min(rank + spare, *x.shape)
    basis = torch.randn(x.shape[1], width, generator=generator).to(x.device)
    if start is not None:
        basis[:, : start.shape[0]] = start.float().T
    basis = _orthogonal(basis, 1)
    for place in range(iterations):
        # What is multiplied again need not be orthogonal to the last digit.
        basis = _orthogonal(x.T @ (x @ basis), 2 if place == iterations - 1 else 1)
    image = x @ basis
    if width == rank:
        return image, basis.T
    wide = image.double()
    turn = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :rank].to(x.dtype)
    return image @ turn, (basis @ turn).T


def _orthogonal(x: torch.Tensor, passes: int) -> torch.Tensor:
    """An orthonormal basis of the columns' span; directions that are not there come out shorter, down to zero."""
    wide = x.double()
    # The Gram matrix squares what tells the directions apart: columns of equal length, and a second pass.
    for _ in range(passes):
        wide = wide / wide.norm(dim=0).clamp_min(1e-300)
        gram = wide.T @ wide
        # What is added keeps a matrix of lower rank positive; `cholesky_ex` waits for no verdict.
        gram.diagonal().add_(1e-12 * len(gram))
        factor, _ = torch.linalg.cholesky_ex(gram)
        wide = torch.linalg.solve_triangular(factor.T, wide, upper=True, left=False)
    return wide.to(x.dtype)
