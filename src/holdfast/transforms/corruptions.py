"""Corruptions in the manner of ImageNet-C: 15 kinds at 5 severities, batch-wise, seeded by sample.

The constants are those of CIFAR-10-C for images below 100 pixels and those of ImageNet-C for larger ones (Hendrycks and
Dietterich 2019). Four kinds are made in another way than the published files: frost is drawn, where those use
photographs; the clouds of fog come from octaves of noise; glass blur moves all pixels at once; images beyond an edge
repeat it. Figures can be compared between networks here, not with published ones; for these, read the published files
as a data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown
from ..noise import CorruptionPart, CorruptionStream, Noise
from ..threat import column
from ..user_input import typed, whole
from .filters import (
    box_resized,
    clouds,
    disk_blur,
    displaced,
    gaussian_blur,
    jpeg,
    motion_blur,
    pixel_grid,
    poisson,
    sample_at,
    zoomed,
)

SEVERITIES = (1, 2, 3, 4, 5)
LARGE = 100  # pixels: from this shorter side on, the constants of ImageNet-C
LEAST_SIDE = 8  # pixels: one block of JPEG
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue
FROST = (0.85, 0.93, 1.0)  # the colour of frost, as red, green and blue
AXES = (CorruptionPart.DOWN, CorruptionPart.RIGHT)
FIVE = tuple[Any, Any, Any, Any, Any]


@dataclass(frozen=True)
class Corruption:
    """One entry of CORRUPTIONS.

    Attributes:
        function: (x, noise, *settings) -> (N, C, H, W), before it is clipped to [0, 1].
        about: one line about it, for lists.
        small: its settings at each severity, of CIFAR-10-C.
        large: its settings at each severity, of ImageNet-C.
    """

    function: Callable[..., Tensor]
    about: str
    small: FIVE
    large: FIVE


def _gaussian_noise(x: Tensor, noise: Noise, sigma: float) -> Tensor:
    return x + sigma * noise.normal(tuple(x.shape[1:]), x.dtype)


def _shot_noise(x: Tensor, noise: Noise, photons: float) -> Tensor:
    return poisson(x * photons, noise) / photons


def _impulse_noise(x: Tensor, noise: Noise, share: float) -> Tensor:
    shape = tuple(x.shape[1:])
    hit, white = noise.uniform(shape, x.dtype) < share, noise.fold(CorruptionPart.WHITE).uniform(shape, x.dtype) < 0.5
    return torch.where(hit, white.to(x.dtype), x)


def _defocus_blur(x: Tensor, noise: Noise, radius: float, sigma: float) -> Tensor:
    return disk_blur(x, radius, sigma)


def _glass_blur(x: Tensor, noise: Noise, sigma: float, far: int, times: int) -> Tensor:
    x = gaussian_blur(x, sigma)
    for time in range(times):
        down, right = (noise.fold(time, axis).integers(2 * far, tuple(x.shape[-2:])) - far for axis in AXES)
        x = displaced(x, down, right)
    return gaussian_blur(x, sigma)


def _motion_blur(x: Tensor, noise: Noise, radius: int, sigma: float) -> Tensor:
    return motion_blur(x, radius, sigma, 90 * noise.uniform((), x.dtype) - 45)


def _zoom_blur(x: Tensor, noise: Noise, count: int, step: float) -> Tensor:
    return (x + sum(zoomed(x, 1 + i * step) for i in range(count))) / (count + 1)


def _snow(
    x: Tensor, noise: Noise, mean: float, std: float, zoom: float, least: float, radius: int, sigma: float, share: float
) -> Tensor:
    flakes = zoomed(mean + std * noise.normal((1, *x.shape[-2:]), x.dtype), zoom)
    flakes = flakes.masked_fill(flakes < least, 0.0).clamp(0, 1)
    flakes = motion_blur(flakes, radius, sigma, -135 + 90 * noise.fold(CorruptionPart.ANGLE).uniform((), x.dtype))
    white = share * x + (1 - share) * torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return white + flakes + flakes.rot90(2, (-2, -1))


def _frost(x: Tensor, noise: Noise, share: float, ice: float) -> Tensor:
    ridges = 1 - (2 * clouds(x, noise, 1.3) - 1).abs()  # thin bright lines, as crystals have
    tint = torch.tensor(FROST if x.shape[1] == 3 else (1.0,), dtype=x.dtype, device=x.device)
    return share * x + ice * (0.25 + 0.75 * ridges**3) * tint.view(1, -1, 1, 1)


def _fog(x: Tensor, noise: Noise, thickness: float, decay: float) -> Tensor:
    brightest = column(x.flatten(1).amax(1), x)
    return (x + thickness * clouds(x, noise, decay)) * brightest / (brightest + thickness)


def _brightness(x: Tensor, noise: Noise, more: float) -> Tensor:
    value = x.amax(1, keepdim=True)  # of hue, saturation and value
    brighter = (value + more).clamp(0, 1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-12)), brighter)


def _contrast(x: Tensor, noise: Noise, factor: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: Tensor, noise: Noise, far: float, sigma: float, corner: float) -> Tensor:
    h, w = x.shape[-2:]
    side, third = min(h, w), min(h, w) // 3
    rows, cols = pixel_grid(x)
    smooth = [
        gaussian_blur(2 * noise.fold(axis).uniform((1, h, w), x.dtype) - 1, sigma * side, 3.0)[:, 0] for axis in AXES
    ]
    rows, cols = rows + far * side * smooth[0], cols + far * side * smooth[1]
    middle = (h // 2, w // 2)
    fixed = [[middle[0] + a * third, middle[1] + b * third, 1.0] for a, b in ((1, 1), (1, -1), (-1, -1))]
    points = torch.tensor(fixed, dtype=x.dtype, device=x.device)
    moved = points[:, :2] + corner * side * (2 * noise.fold(CorruptionPart.POINTS).uniform((3, 2), x.dtype) - 1)
    affine = torch.linalg.solve(points, moved)  # (N, 3, 2): what takes the three points to where they were moved
    affine = affine.mT[..., None, None]
    from_rows, from_cols = (affine[:, k, 0] * rows + affine[:, k, 1] * cols + affine[:, k, 2] for k in (0, 1))
    return sample_at(x, from_rows, from_cols, "reflection")


def _pixelate(x: Tensor, noise: Noise, share: float) -> Tensor:
    h, w = x.shape[-2:]
    return box_resized(box_resized(x, (int(h * share), int(w * share))), (h, w))


def _jpeg_compression(x: Tensor, noise: Noise, quality: int) -> Tensor:
    return jpeg(x, quality)


def _grey(x: Tensor) -> Tensor:
    """(N, 1, H, W): the luminance of RGB, the mean of any other channels."""
    weights = x.new_tensor(GREY) if x.shape[1] == 3 else x.new_full((x.shape[1],), 1 / x.shape[1])
    return torch.einsum("c,nchw->nhw", weights, x)[:, None]


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        _gaussian_noise, "Gaussian noise, as in poor light",
        (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": Corruption(
        _shot_noise, "Poisson noise of single photons", (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)
    ),
    "impulse_noise": Corruption(
        _impulse_noise, "salt and pepper, as of bit errors",
        (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": Corruption(
        _defocus_blur, "out of focus",
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        _glass_blur, "seen through frosted glass",
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        _motion_blur, "the camera moves",
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        _zoom_blur, "the camera moves towards the object",
        ((6, 0.01), (11, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
        ((11, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    ),
    "snow": Corruption(
        _snow, "falling snow",
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        _frost, "ice crystals on the lens, drawn",
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(
        _fog, "fog in clouds",
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(
        _brightness, "brighter", (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        _contrast, "less contrast", (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "elastic_transform": Corruption(
        _elastic_transform, "stretched in small regions, sheared as a whole",
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": Corruption(
        _pixelate, "enlarged from fewer pixels", (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg_compression": Corruption(
        _jpeg_compression, "JPEG at a low quality", (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)
    ),
}  # fmt: skip


@typed
def corrupt(x: Tensor, kind: str, severity: int, *, noise: Noise) -> Tensor:
    """Corrupt images.

    Args:
        x: (N, C, H, W), float in [0, 1], at least 8x8 pixels; three channels are RGB.
        kind: a key of CORRUPTIONS.
        severity: 1 to 5.
        noise: of these samples. The same sample is corrupted in the same way in every batch, and all severities share
            their random numbers.

    Returns:
        (N, C, H, W) in [0, 1], rounded to multiples of 1/255, as an image file holds them.

    Raises:
        UserError: no such kind or severity, or images of another shape, type or range.

    Source: Hendrycks and Dietterich 2019; see the module for what differs.

    >>> x = torch.full((1, 1, 8, 8), 0.5)
    >>> corrupt(x, "brightness", 1, noise=Noise(0, torch.arange(1)))[0, 0, 0, 0]
    tensor(0.5490)
    """
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind, CORRUPTIONS)
    whole("severity", severity, 1, 5)
    check_corruptible(x)
    if len(noise) != len(x):
        raise UserError(f"noise must be that of the {len(x)} images of x, got that of {len(noise)}.")
    entry = CORRUPTIONS[kind]
    settings = (entry.small if min(x.shape[-2:]) < LARGE else entry.large)[severity - 1]
    own = noise.fold(CorruptionStream[kind.upper()])
    with torch.no_grad():
        out = entry.function(x, own, *(settings if isinstance(settings, tuple) else (settings,)))
    return (out.clamp(0, 1) * 255).round() / 255


def check_corruptible(x: Tensor) -> None:
    """Raise UserError for what ``corrupt`` cannot take: not float in [0, 1], or below 8x8 pixels."""
    if x.ndim != 4 or min(x.shape[-2:]) < LEAST_SIDE:
        raise UserError(f"corruptions need images (N, C, H, W) of at least 8x8 pixels, got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise UserError(f"x must be float images in [0, 1], got {x.dtype}. Divide by 255 first.")
    if x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        low, high = (float(value) for value in x.aminmax())
        raise UserError(f"x must lie in [0, 1], got values from {low:.4g} to {high:.4g}. Scale it first.")
