"""Low-bit formats of weights and activations: quantization and dequantization in plain torch.

Each function is the definition of its format. Tests compare the Triton kernels and the GPU's matrix units with these
functions, and these with independent float64 arithmetic. Scales are float32 (NVFP4's block scales are e4m3), and a
stored value times its scale is the number again.

- e4m3 (`fp8`): 1 sign, 4 exponent, 3 mantissa bits, largest 448 (https://arxiv.org/abs/2209.05433). One scale per
  tensor, per row, or per block of 128 x 128 weights and 1 x 128 activations.
- INT8, symmetric, -127 to 127, one scale per row.
- NVFP4: e2m1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6), one e4m3 block scale for every 16 values of a row, and one float32
  global scale. A byte holds two values, the first in the low bits, as NVIDIA ModelOpt packs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
BLOCK = 128
GROUP = 16
# Magnitudes of e2m1, and the midpoints between neighbours. An exact midpoint rounds to the even code.
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def scale_of(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The float32 scale that maps `amax` to a format's largest value; 1 where `amax` is zero."""
    scale = amax.float() / largest
    # A scale below the smallest normal number counts as zero too: a quotient would overflow.
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest e4m3; magnitudes above 448 become 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest integer from -127 to 127, ties to even."""
    return x.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


# --- e4m3 and INT8 ----------------------------------------------------------------------------------------------------


def quantize_in_chunks(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor, most: int = 2**24
) -> tuple[torch.Tensor, ...]:
    """Quantizes a tensor in chunks of rows, so that the float32 intermediates take little memory.

    Args:
        quantize: Maps (rows, columns) to tensors with rows. Rows, or blocks of 128 rows, must be independent.
        x: (rows, columns).
        most: Largest number of values in a chunk, approximately.

    Returns:
        The tensors of `quantize`, of all rows.
    """
    rows = max(1, most // x.shape[1] // BLOCK) * BLOCK
    chunks = [quantize(chunk) for chunk in x.split(rows)]
    if len(chunks) == 1:
        return chunks[0]
    # Concatenated as bytes: `torch.cat` does not support all low-bit dtypes.
    return tuple(
        torch.cat([item.view(torch.uint8) for item in items]).view(items[0].dtype)
        for items in zip(*chunks, strict=True)
    )


def tensor_scale(x: torch.Tensor, largest: float = E4M3_MAX) -> torch.Tensor:
    """The scale of a whole tensor, (rows, columns): float32 (1,)."""
    low, high = x.aminmax()
    return scale_of(torch.maximum(high.float(), -low.float()), largest).reshape(1)


def quantize_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale: values in the shape of `x`, and the scale, float32 (1,)."""
    scale = tensor_scale(x)
    return to_e4m3(x.float() / scale), scale


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 or int8 with one scale per row: values (rows, columns), and scales, float32 (rows, 1)."""
    int8 = dtype == torch.int8
    scale = scale_of(x.abs().amax(1, keepdim=True), INT8_MAX if int8 else E4M3_MAX)
    scaled = x.float() / scale
    return (to_int8(scaled) if int8 else to_e4m3(scaled)), scale


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale per 128 columns of a row; the last group may be shorter.

    Returns:
        Values (rows, columns), and scales, float32 (rows, columns / 128 rounded up).
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scale = scale_of(padded.abs().amax(-1), E4M3_MAX)
    return to_e4m3(padded / scale[..., None]).view(rows, -1)[:, :columns].contiguous(), scale


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale per block of 128 x 128; blocks at the edges may be smaller.

    Returns:
        Values (rows, columns), and scales, float32 (rows / 128, columns / 128), both rounded up.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = scale_of(tiles.abs().amax((1, 3)), E4M3_MAX)
    values = to_e4m3(tiles / scale[:, None, :, None]).view(padded.shape)
    return values[:rows, :columns].contiguous(), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 values (rows, columns) of e4m3 or INT8. The shape of `scale` tells the format: (1,), (rows, 1), groups
    (rows, columns / 128) or blocks (rows / 128, columns / 128)."""
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
    """Codes of the nearest e2m1 values, uint8 from 0 to 15: three bits of magnitude below a sign bit."""
    magnitude = x.abs()
    midpoints = torch.tensor(_E2M1_MIDPOINTS, dtype=x.dtype, device=x.device)
    # `bucketize` rounds a midpoint down; where that gives an odd code, the even code above is taken.
    code = torch.bucketize(magnitude, midpoints)
    up = torch.bucketize(magnitude, midpoints, right=True)
    code = torch.where(code % 2 == 1, up, code)
    return (code + 8 * (x < 0)).to(torch.uint8)


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e2m1 codes, in the shape of `codes`."""
    values = torch.tensor(_E2M1_VALUES + tuple(-value for value in _E2M1_VALUES), device=codes.device)
    return values[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes per byte: (rows, columns) -> uint8 (rows, columns / 2)."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, columns / 2) -> codes (rows, columns)."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes to NVFP4.

    Args:
        x: (rows, columns), columns a multiple of 16.
        global_scale: float32 (1,); `None` computes the scale that maps the largest block scale to 448.

    Returns:
        Packed codes uint8 (rows, columns / 2), block scales e4m3 (rows, columns / 16), global scale float32 (1,).

    Raises:
        ValueError: The number of columns is no multiple of 16.
    """
    rows, columns = x.shape
    if columns % GROUP:
        raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} values, not {columns}. Pad the last dimension.")
    groups = x.float().view(rows, -1, GROUP)
    amax = groups.abs().amax(-1)
    if global_scale is None:
        global_scale = scale_of(amax.amax(), E2M1_MAX * E4M3_MAX).reshape(1)
    block_scale = nvfp4_scales(amax, global_scale)
    scale = (block_scale.float() * global_scale)[..., None]
    # The scale of a block far smaller than the largest may round to 0; its values are 0 then.
    scaled = torch.where(scale == 0, torch.zeros_like(groups), groups / scale)
    return pack(to_e2m1(scaled).view(rows, columns)), block_scale, global_scale


def nvfp4_scales(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales of NVFP4.

    Args:
        amax: (rows, columns / 16): largest magnitude of each block.
        global_scale: float32 (1,).

    Returns:
        e4m3 (rows, columns / 16).
    """
    block_scale = to_e4m3(scale_of(amax, E2M1_MAX) / global_scale)
    # A block of zeros has the scale 1, as ModelOpt writes it.
    return torch.where(amax == 0, torch.ones_like(amax), block_scale.float()).to(torch.float8_e4m3fn)


def dequantize_nvfp4(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of NVFP4.

    Args:
        packed: uint8 (rows, columns / 2): two codes per byte.
        block_scale: e4m3 (rows, columns / 16).
        global_scale: float32 (1,), or (rows, 1) of packed layers.

    Returns:
        float32 (rows, columns).
    """
    values = from_e2m1(unpack(packed)).view(packed.shape[0], -1, GROUP)
    return (values * (block_scale.float() * global_scale)[..., None]).flatten(1)


def swizzled(block_scale: torch.Tensor) -> torch.Tensor:
    """Block scales in the order that Blackwell's matrix units read
    (https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout).

    The order is flat, in tiles of 128 rows by four scales. Within a tile, scale c of row r lies at
    16 (r mod 32) + 4 (r div 32) + c. Tiles at the edges are padded with zeros.

    Args:
        block_scale: e4m3 (rows, columns / 16).
    """
    rows, columns = block_scale.shape
    padded = torch.nn.functional.pad(block_scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(block_scale.dtype)


# --- low-rank branch --------------------------------------------------------------------------------------------------


def low_rank(
    x: torch.Tensor, rank: int, iterations: int = 3, start: torch.Tensor | None = None, oversampling: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """A near-optimal low-rank approximation, by randomized subspace iteration (https://arxiv.org/abs/0909.4061).

    The random start is seeded: one kind of device gives one matrix the same factors every time. Bases are made
    orthogonal by the Cholesky factor of their small Gram matrix, which is far cheaper on a GPU than a QR of the tall
    basis.

    Args:
        x: (rows, columns).
        rank: Largest rank of the approximation.
        iterations: Number of multiplications by `x` and its transpose.
        start: (n, columns): directions that replace the first n random ones; `None` for random ones alone.
        oversampling: Number of directions beyond `rank`. With 0 the choice of the best directions is saved.

    Returns:
        float32 factors (rows, rank) and (rank, columns), whose product approximates `x`.
    """
    generator = torch.Generator().manual_seed(0)
    x = x.float()
    rank = min(rank, *x.shape)
    width = min(rank + oversampling, *x.shape)
    basis = torch.randn(x.shape[1], width, generator=generator).to(x.device)
    if start is not None:
        basis[:, : start.shape[0]] = start.float().T
    basis = _orthogonal(basis, 1)
    for iteration in range(iterations):
        # Full orthogonality matters after the last iteration only: one pass suffices before.
        basis = _orthogonal(x.T @ (x @ basis), 2 if iteration == iterations - 1 else 1)
    image = x @ basis
    if width == rank:
        return image, basis.T
    image_double = image.double()
    rotation = torch.linalg.eigh(image_double.T @ image_double).eigenvectors.flip(1)[:, :rank].to(x.dtype)
    return image @ rotation, (basis @ rotation).T


def _orthogonal(x: torch.Tensor, passes: int) -> torch.Tensor:
    """An orthonormal basis of the columns' span. Where the columns are dependent, vectors come out shorter, down to
    zero."""
    basis = x.double()
    # A Gram matrix squares the condition number: columns are normalized first, and a second pass corrects the rest.
    for _ in range(passes):
        basis = basis / basis.norm(dim=0).clamp_min(1e-300)
        gram = basis.T @ basis
        # The shift keeps a singular matrix positive definite; `cholesky_ex` does not synchronize with the device.
        gram.diagonal().add_(1e-12 * len(gram))
        factor, _ = torch.linalg.cholesky_ex(gram)
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
    return basis.to(x.dtype)
