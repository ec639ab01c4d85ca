"""Corruptions: each against a form of its own, Pillow or SciPy; seeded by sample; refused where they mean nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image

from holdfast.errors import UserError
from holdfast.noise import CorruptionStream, Noise
from holdfast.transforms import CORRUPTIONS, SEVERITIES, corrupt
from holdfast.transforms.filters import (
    box_resized,
    clouds,
    disk_blur,
    displaced,
    gaussian_blur,
    jpeg,
    motion_blur,
    poisson,
    zoomed,
)

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog")


def smooth_images(n, c=3, h=32, w=32, seed=0):
    x = gaussian_blur(torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed)), 1.0)
    x = (x - x.amin()) / (x.amax() - x.amin())
    return (x * 255).round() / 255


def of(x, first=0):
    return Noise(0, torch.arange(first, first + len(x)))


def levels(x):
    return (x.movedim(-3, -1) * 255).round().byte().numpy()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 24), (4, 9, 9), (3, 112, 100)])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupted_image_is_an_image(kind, shape):
    x = smooth_images(2, *shape)
    for severity in (1, 5) if shape[1] < 100 else (5,):
        out = corrupt(x, kind, severity, noise=of(x))
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert bool(((out >= 0) & (out <= 1)).all())
        assert torch.allclose(out * 255, (out * 255).round(), atol=1e-4)
        assert bool((out != x).any())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_sample_is_corrupted_in_the_same_way_in_every_batch(kind):
    x = smooth_images(5)
    whole = corrupt(x, kind, 3, noise=of(x))
    alone = corrupt(x[3:4], kind, 3, noise=of(x[3:4], 3))
    assert float((whole[3] - alone[0]).abs().max()) < 1.5 / 255  # rounding to 8 bits may turn over
    assert float((whole[3] != alone[0]).float().mean()) < 0.01


@pytest.mark.parametrize("kind", RANDOM)
def test_two_samples_and_two_seeds_are_corrupted_in_two_ways(kind):
    x = smooth_images(1).repeat(2, 1, 1, 1)
    first, second = corrupt(x, kind, 5, noise=of(x))
    other = corrupt(x, kind, 5, noise=Noise(1, torch.arange(2)))
    assert bool((first != second).any())
    assert bool((other[0] != first).any())


@pytest.mark.parametrize(
    "kind", sorted(set(CORRUPTIONS) - {"elastic_transform", "glass_blur", "pixelate", "frost", "snow"})
)
def test_a_higher_severity_changes_more(kind):
    """Of the others, the constants of CIFAR-10-C trade one change for another."""
    x = smooth_images(8)
    moved = [float((corrupt(x, kind, severity, noise=of(x)) - x).abs().mean()) for severity in SEVERITIES]
    assert moved == sorted(moved)
    assert moved[4] > 1.3 * moved[0]


def test_each_kind_has_a_stream_of_its_own():
    assert {kind.upper() for kind in CORRUPTIONS} == {one.name for one in CorruptionStream}
    assert len({int(one) for one in CorruptionStream}) == len(CorruptionStream)
    assert all(len(entry.small) == len(entry.large) == 5 for entry in CORRUPTIONS.values())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [80, 50, 25, 10])
def test_jpeg_is_that_of_pillow(quality, channels):
    """Up to the way that colours are enlarged: a small part of what compression changes."""

    def pillow(image):
        buffer, array = io.BytesIO(), levels(image)
        Image.fromarray(array[..., 0] if channels == 1 else array).save(buffer, "JPEG", quality=quality)
        out = torch.from_numpy(np.array(Image.open(buffer))).float() / 255
        return out[None] if channels == 1 else out.movedim(-1, 0)

    x = smooth_images(4, channels, 40, 24)
    wanted = torch.stack([pillow(image) for image in x])
    apart, changed = float((jpeg(x, quality) - wanted).abs().mean()), float((x - wanted).abs().mean())
    assert apart < (0.08 if channels == 1 else 0.2) * changed


@pytest.mark.parametrize("size", [(30, 20), (7, 5), (40, 64)])
def test_pixels_are_enlarged_as_pillow_does(size):
    x = smooth_images(1, 1, 32, 32)
    wanted = np.array(Image.fromarray(levels(x[0])[..., 0]).resize(size[::-1], Image.BOX))
    assert np.abs(box_resized(x, size)[0, 0].numpy() * 255 - wanted).max() < 1.01


def test_blurs_are_those_of_scipy():
    x = smooth_images(2, 1, 20, 24)
    for sigma in (0.4, 1.0, 3.0):
        wanted = scipy.ndimage.gaussian_filter(x[0, 0].double().numpy(), sigma, mode="nearest", truncate=4.0)
        assert np.abs(gaussian_blur(x, sigma)[0, 0].numpy() - wanted).max() < 1e-5
    radius, at = 3, np.arange(-4, 5)
    disk = ((at[:, None] ** 2 + at**2) <= radius**2).astype(float)
    wanted = scipy.ndimage.correlate(x[0, 0].double().numpy(), disk / disk.sum(), mode="nearest")
    assert np.abs(disk_blur(x, radius, 1e-3)[0, 0].numpy() - wanted).max() < 1e-5


def test_motion_is_along_its_angle():
    x = torch.zeros(2, 1, 9, 9)
    x[:, :, 4, 4] = 1.0
    right, up = motion_blur(x, 2, 2.0, torch.tensor([0.0, 90.0]))[:, 0]
    assert int((right[4] > 0).sum()) == 5
    assert float(right.sum()) == pytest.approx(float(right[4].sum())) == pytest.approx(1.0)
    assert float(up.sum()) == pytest.approx(float(up[:, 4].sum())) == pytest.approx(1.0)


def test_pixels_move_by_whole_steps_and_a_zoom_keeps_the_middle():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    moved = displaced(x, torch.ones(1, 3, 3, dtype=torch.int64), torch.zeros(1, 3, 3, dtype=torch.int64))
    assert moved[0, 0].tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [6.0, 7.0, 8.0]]
    assert zoomed(x, 2.0)[0, 0, 1].tolist() == pytest.approx([3.5, 4.0, 4.5])
    assert torch.allclose(zoomed(x, 1.0), x, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0, 40.0, 500.0])
def test_poisson_numbers_are_poisson(mean):
    drawn = poisson(torch.full((1, 20_000), mean), Noise(0, torch.arange(1)))[0].double().numpy()
    assert (drawn == np.round(drawn)).all()
    if mean == 0:
        assert (drawn == 0).all()
        return
    assert abs(drawn.mean() - mean) < 5 * (mean / len(drawn)) ** 0.5
    assert drawn.var() == pytest.approx(mean, rel=0.08)
    at = round(mean)
    assert abs((drawn <= at).mean() - scipy.stats.poisson.cdf(at, mean)) < 0.02


def test_clouds_fill_the_range_and_decay():
    maps = {decay: clouds(smooth_images(4), of(smooth_images(4)), decay) for decay in (1.4, 3.0)}
    for one in maps.values():
        assert one.amin((1, 2, 3)).tolist() == [0.0] * 4
        assert one.amax((1, 2, 3)).tolist() == pytest.approx([1.0] * 4)
    rough = {decay: float(one.diff(dim=-1).abs().mean()) for decay, one in maps.items()}
    assert rough[1.4] > 1.5 * rough[3.0]


def test_formulas():
    x, noise = smooth_images(2), of(smooth_images(2))
    mean = x.mean((2, 3), keepdim=True)
    assert float((corrupt(x, "contrast", 2, noise=noise) - (mean + 0.5 * (x - mean))).abs().max()) < 0.6 / 255
    brighter = corrupt(x, "brightness", 2, noise=noise)
    assert torch.allclose(brighter.amax(1), (x.amax(1) + 0.1).clamp(0, 1), atol=0.6 / 255)
    grey = torch.full((2, 3, 32, 32), 0.5)
    residual = corrupt(grey, "gaussian_noise", 5, noise=noise) - 0.5
    assert float(residual.std()) == pytest.approx(0.1, rel=0.05)
    hit = (corrupt(grey, "impulse_noise", 5, noise=noise) - 0.5).abs() > 0.4
    assert float(hit.float().mean()) == pytest.approx(0.07, rel=0.2)
    shot = corrupt(grey, "shot_noise", 5, noise=noise) - 0.5
    assert float(shot.std()) == pytest.approx(0.1, rel=0.1)


def test_what_cannot_be_corrupted_is_refused():
    x = smooth_images(1)
    with pytest.raises(UserError, match="Did you mean 'fog'"):
        corrupt(x, "frog", 1, noise=of(x))
    with pytest.raises(UserError, match="severity must be a whole number"):
        corrupt(x, "fog", 6, noise=of(x))
    with pytest.raises(UserError, match="at least 8x8"):
        corrupt(x[..., :7], "fog", 1, noise=of(x))
    with pytest.raises(UserError, match="Divide by 255"):
        corrupt((x * 255).byte(), "fog", 1, noise=of(x))
    with pytest.raises(UserError, match="must lie in \\[0, 1\\]"):
        corrupt(2 * x, "fog", 1, noise=of(x))
    with pytest.raises(UserError, match="noise must be that of the 1 images"):
        corrupt(x, "fog", 1, noise=Noise(0, torch.arange(2)))
