"""What corruptions are made of: blurs, clouds, displaced pixels and JPEG, batch-wise on (N, C, H, W) in [0, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import Noise

# Annex K of the JPEG standard: what luminance and chrominance are divided by at quality 50.
LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *[99] * 32,
)  # fmt: skip
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def pixel_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each pixel, (H, W) each, in the type of x."""
    rows, cols = (torch.arange(side, dtype=x.dtype, device=x.device) for side in x.shape[-2:])
    grid_rows, grid_cols = torch.meshgrid(rows, cols, indexing="ij")
    return grid_rows, grid_cols


def sample_at(x: Tensor, rows: Tensor, cols: Tensor, padding: str) -> Tensor:
    """The images at points between pixels, by bilinear interpolation.

    Args:
        x: (N, C, H, W).
        rows: (N, H, W), the row that each pixel takes its value from; 0 is the centre of the first.
        cols: (N, H, W), the column likewise.
        padding: beyond the edge: "zeros", "border" or "reflection".

    Returns:
        (N, C, H, W).
    """
    h, w = x.shape[-2:]
    grid = torch.stack([(2 * cols + 1) / w - 1, (2 * rows + 1) / h - 1], -1)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def displaced(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each pixel replaced by the one so many whole pixels away, (N, H, W) or (N, 1, 1) each; edges are repeated."""
    n, c, h, w = x.shape
    rows, cols = (torch.arange(side, device=x.device) for side in (h, w))
    rows, cols = (rows[:, None] + down).clamp(0, h - 1), (cols + right).clamp(0, w - 1)
    place = (rows * w + cols).expand(n, h, w).reshape(n, 1, h * w)
    return x.flatten(2).gather(2, place.expand(n, c, h * w)).view_as(x)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of the images, enlarged by a factor >= 1."""
    rows, cols = pixel_grid(x)
    middle = [(side - 1) / 2 for side in x.shape[-2:]]
    rows, cols = (rows - middle[0]) / factor + middle[0], (cols - middle[1]) / factor + middle[1]
    return sample_at(x, rows.expand(len(x), -1, -1), cols.expand(len(x), -1, -1), "border")


def box_resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The images at another size, each pixel the mean of those whose centres lie in it, as Pillow's BOX has it."""
    for dim, new in zip((-2, -1), size, strict=True):
        old = x.shape[dim]
        centers = (torch.arange(new, dtype=x.dtype, device=x.device) + 0.5) * (old / new)
        away = (torch.arange(old, dtype=x.dtype, device=x.device) + 0.5 - centers[:, None]) / max(1.0, old / new)
        weights = ((away > -0.5) & (away <= 0.5)).to(x.dtype)
        x = (x.transpose(dim, -1) @ (weights / weights.sum(1, keepdim=True)).T).transpose(dim, -1)
    return x


def gaussian_blur(x: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """A Gaussian blur of standard deviation sigma, in pixels, cut off at ``truncate`` of them; edges are repeated."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    return _separable(x, weights / weights.sum())


def _separable(x: Tensor, weights: Tensor) -> Tensor:
    """The same weights along rows and along columns, as two matrices: a wide blur then costs no more than a narrow one.

    Each row of a matrix holds what one pixel takes from the others; weights beyond the edge count for the edge.
    """
    radius = len(weights) // 2
    for dim in (-2, -1):
        side = x.shape[dim]
        place = torch.arange(side, device=x.device)[:, None] + torch.arange(-radius, radius + 1, device=x.device)
        matrix = x.new_zeros(side, side).scatter_add_(1, place.clamp(0, side - 1), weights.expand(side, -1))
        x = (x.transpose(dim, -1) @ matrix.T).transpose(dim, -1)
    return x


def disk_blur(x: Tensor, radius: float, sigma: float) -> Tensor:
    """The mean over a disk, as a lens out of focus gives it; the disk's edge is softened by a small Gaussian blur."""
    half = max(2, math.ceil(radius) + 1)
    at = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).to(x.dtype)
    reach = 1 if radius <= 8 else 2
    soft = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    disk = _separable((disk / disk.sum())[None, None], soft / soft.sum())
    padded = F.pad(x, (half, half, half, half), mode="replicate")
    return F.conv2d(padded.flatten(0, 1)[:, None], disk).view_as(x)


def motion_blur(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """The mean over a path that begins at each pixel, with half a Gaussian as weights.

    Args:
        x: (N, C, H, W).
        radius: the path has 2 radius + 1 pixels.
        sigma: of the weights, in pixels.
        angle: (N,), of the path, in degrees.

    Returns:
        (N, C, H, W).
    """
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(2 * radius + 1)]
    direction = torch.deg2rad(angle)[:, None, None]
    out = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        if weight > 1e-6:
            down, right = (torch.ceil(i * part - 0.5).long() for part in (direction.sin(), direction.cos()))
            out += weight / sum(weights) * displaced(x, down, right)
    return out


def clouds(x: Tensor, noise: Noise, decay: float) -> Tensor:
    """A random height map from 0 to 1 for each image, (N, 1, H, W): octaves of noise, each finer and weaker.

    Args:
        x: whose size and type the map has.
        noise: of these samples.
        decay: an octave is decay^2 times weaker than the one before, as in the diamond-square maps of ImageNet-C.

    Returns:
        (N, 1, H, W).
    """
    side = max(x.shape[-2:])
    octaves = max(1, math.ceil(math.log2(side)))
    total = torch.zeros(len(x), 1, side, side, dtype=x.dtype, device=x.device)
    for octave in range(octaves + 1):
        cells = 2**octave + 1
        values = 2 * noise.fold(octave).uniform((1, cells, cells), x.dtype) - 1
        total += decay ** (-2 * octave) * F.interpolate(values, (side, side), mode="bilinear", align_corners=True)
    total = total[..., : x.shape[-2], : x.shape[-1]]
    total = total - total.amin((1, 2, 3), keepdim=True)
    return total / total.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def poisson(mean: Tensor, noise: Noise) -> Tensor:
    """Poisson numbers, by inversion: the smallest k whose distribution function reaches a uniform number.

    Args:
        mean: (N, ...), >= 0.
        noise: of these samples.

    Returns:
        (N, ...), whole numbers in the type of ``mean``.
    """
    u = noise.uniform(tuple(mean.shape[1:]), mean.dtype)
    low = torch.full_like(mean, -1.0)  # P(X <= low) < u <= P(X <= high)
    high = (mean + 10 * mean.sqrt() + 20).ceil()
    most = float(high.amax()) if mean.numel() else 0.0
    for _ in range(math.ceil(math.log2(most + 2)) + 1):
        middle = ((low + high) / 2).floor()
        reached = torch.special.gammaincc(middle.clamp_min(0.0) + 1, mean) >= u
        reached = torch.where(mean == 0, middle >= 0, reached) & (middle >= 0)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def jpeg(x: Tensor, quality: int) -> Tensor:
    """The images after baseline JPEG with the standard tables and, for three channels, colour at half the resolution.

    Args:
        x: (N, C, H, W) in [0, 1]; three channels are RGB, each of any other number is coded as luminance.
        quality: 1 to 100, as encoders number it.

    Returns:
        (N, C, H, W) in [0, 1], multiples of 1/255.

    Source: ITU-T T.81; the scale of quality is that of the Independent JPEG Group.
    """
    h, w = x.shape[-2:]
    levels = F.pad((255 * x).round(), (0, -w % 16, 0, -h % 16), mode="replicate")
    if x.shape[1] != 3:
        out = _coded(levels, LUMINANCE, quality)
    else:
        to_ycbcr = torch.tensor(TO_YCBCR, dtype=x.dtype, device=x.device)
        ycbcr = torch.einsum("kc,nchw->nkhw", to_ycbcr, levels)
        luminance = _coded(ycbcr[:, :1].round(), LUMINANCE, quality)
        half = F.avg_pool2d(ycbcr[:, 1:], 2).round() + 128
        chrominance = _coded(half, CHROMINANCE, quality) - 128
        chrominance = F.interpolate(chrominance, levels.shape[-2:], mode="bilinear", align_corners=False)
        back = torch.linalg.inv(to_ycbcr)
        out = torch.einsum("ck,nkhw->nchw", back, torch.cat([luminance, chrominance], 1))
    return out[..., :h, :w].round().clamp(0, 255) / 255


def _coded(levels: Tensor, table: tuple[int, ...], quality: int) -> Tensor:
    """Values from 0 to 255 after each 8x8 block's cosine transform was rounded to multiples of the table's entries."""
    n, c, h, w = levels.shape
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor([min(255, max(1, (q * scale + 50) // 100)) for q in table], device=levels.device)
    steps = steps.view(8, 8).to(levels.dtype)
    at = torch.arange(8, dtype=levels.dtype, device=levels.device)
    cosine = torch.cos((2 * at + 1) * at[:, None] * math.pi / 16) / 2
    cosine[0] /= math.sqrt(2)
    blocks = (levels - 128).view(n, c, h // 8, 8, w // 8, 8).movedim(3, 4)
    coefficients = torch.einsum("ki,ncabij,lj->ncabkl", cosine, blocks, cosine)
    coefficients = (coefficients / steps).round() * steps
    blocks = torch.einsum("ki,ncabkl,lj->ncabij", cosine, coefficients, cosine)
    return (blocks.movedim(4, 3).reshape(n, c, h, w) + 128).round().clamp(0, 255)
