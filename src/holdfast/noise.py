"""Random numbers that depend on the seed and the sample alone, not on batch size, order or number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the increment of SplitMix64's counter


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which an int64 tensor can hold."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_MIX1, _MIX2, _STRIDE = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB), _signed(_GAMMA)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place on int64. Multiplication wraps; the masks turn >> into a logical shift."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _MIX1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MIX2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def _mix_int(z: int) -> int:
    """The same for a Python integer."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Noise:
    """Counter-based noise: a sample's numbers are a hash of (seed, index, position), whatever its place in a batch.

    ``noise[rows]`` is the noise of these samples; ``noise.fold(k)`` is an independent stream (restart k, step k, ...).

    Args:
        seed: any integer.
        index: (N,) int64, the samples' own indices: positions in the data set, not in the batch.

    Source: SplitMix64 (Steele, Lea, Flood 2014), used as a hash of a counter.

    >>> noise = Noise(0, torch.arange(4))
    >>> bool((noise.uniform((2, 3))[1:3] == noise[1:3].uniform((2, 3))).all())
    True
    >>> bool((noise.uniform((3,)) == noise.fold(1).uniform((3,))).any())
    False
    """

    seed: int
    index: Tensor

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Noise:
        return replace(self, index=self.index[rows])

    def fold(self, *keys: int) -> Noise:
        """An independent stream for these integer keys: ``noise.fold(restart, step)``."""
        seed = self.seed
        for key in keys:
            seed = _mix_int(_mix_int(seed + _GAMMA) ^ (key + 1))
        return replace(self, seed=seed)

    def fold_each(self, keys: Tensor) -> Noise:
        """An independent stream for each sample's own key; a key of 0 gives this noise.

        Args:
            keys: (N,) int64, from 0 to 2^20. The samples' indices are below 2^40.

        >>> noise = Noise(0, torch.zeros(3, dtype=torch.int64)).fold_each(torch.tensor([0, 1, 1]))
        >>> one, two, three = noise.uniform()
        >>> bool(one == two), bool(two == three)
        (False, True)
        """
        return replace(self, index=self.index + (keys << 40))

    def bits(self, shape: Sequence[int], draw: Tensor | None = None) -> Tensor:
        """(N, *shape) int64, all 64 bits uniform; with ``draw``, (N,) int64 >= 0, each sample's draw of that number."""
        count = math.prod(shape)
        rows = _mix(self.index.to(torch.int64) * _STRIDE + _signed(_mix_int(self.seed + _GAMMA)))
        if draw is not None:  # further along the sample's own sequence, so that no two draws overlap
            rows = rows + draw * _signed(count * _GAMMA)
        cells = torch.arange(1, count + 1, device=self.index.device, dtype=torch.int64) * _STRIDE
        return _mix(rows[:, None] + cells).view(len(self), *shape)

    def uniform(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape), uniform on the open interval (0, 1), so that the logarithm is finite."""
        digits = {torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}.get(dtype, 23)
        whole = (self.bits(shape) >> (64 - digits)) & ((1 << digits) - 1)
        return (whole.to(dtype) + 0.5) * 2.0**-digits

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape), standard normal: the inverse distribution function of ``uniform``."""
        return torch.special.ndtri(self.uniform(shape, dtype))

    def gaussian(self, shape: Sequence[int], draw: Tensor | None = None) -> Tensor:
        """(N, *shape) float32, standard normal with its tails, as a proof needs it.

        ``normal`` has 23 random bits and ends at 5.3 standard deviations, this has 64 and ends at 9.

        Args:
            shape: of one sample.
            draw: (N,) int64 >= 0, which of the sample's draws; None for the first.

        >>> noise = Noise(0, torch.zeros(2, dtype=torch.int64))
        >>> one, two = noise.gaussian((3,), torch.tensor([0, 1]))
        >>> bool((one == two).any()), bool((noise.gaussian((6,))[0] == torch.cat([one, two])).all())
        (False, True)
        """
        bits = self.bits(shape, draw)
        tail = ((bits & (2**63 - 1)).to(torch.float32) + 0.5) * 2.0**-64  # in (0, 1/2], fine where it is small
        return torch.special.ndtri(tail) * ((bits >> 63) * 2 + 1)

    def sign(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape), -1 or +1 with equal probability."""
        return (self.bits(shape) >> 63).to(dtype) * 2 + 1  # the arithmetic shift gives -1 or 0

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(N, *shape) int64, uniform on 0 .. high-1; high at most 2^31, so that the bias is below 2^-22."""
        return (self.uniform(shape, torch.float64) * high).to(torch.int64)


class Stream(IntEnum):
    """Keys of ``Noise.fold`` by name: one class for each parent, so that no two uses of it draw the same numbers.

    A member with a second number, its count, has so many streams in a row: ``numbered`` names one of them. Restarts,
    steps and queries are keys as well, without names. Records were drawn with these values: they never change.
    """

    count: int

    def __new__(cls, value: int, count: int = 1) -> Stream:
        made = int.__new__(cls, value)
        made._value_, made.count = value, count
        return made

    def numbered(self, number: int) -> int:
        """The key of the number-th stream of this name, 0 <= number < count.

        >>> SmoothingStream.ATTACKED.numbered(8)
        108
        """
        if not 0 <= number < self.count:
            raise ValueError(f"{self.name} has {self.count} streams, not one with the number {number}")
        return self.value + number


class EvaluationStream(Stream):
    """Of an evaluation's noise. Smaller keys belong to its stages."""

    AUDIT = 10_000
    SPOT_CHECK = 20_000
    RANDOM_TARGET = 30_000
    GRID = 31_000
    PGD50_SAMPLE = 32_000
    TRANSFORMS = 33_000


class StageStream(Stream):
    """Of the noise of a stage."""

    TARGETS = 0  # one stream for each target, by ``Noise.fold_each``


class AuditStream(Stream):
    """Of the audit's noise."""

    PGD10 = 1  # the same start for all scores that are compared
    EPS_ZERO = 2
    ZERO_GRADIENTS = 3
    SLOPE_START = 4
    SLOPE_DIRECTION = 5
    HUGE_EPS = 6
    TWICE_EPS = 7
    FLOAT64_SURVIVORS = 8
    SQUARE = 9
    RANDOM_NOISE = 11
    INSIDE_POINT = 12
    SURFACE_POINT = 13
    ASCENT_START = 14
    RECAPTURE_APGD = 15
    RECAPTURE_PGD = 20
    RAYS = 30
    DESCENT = 31
    GRID = 32
    MARGIN_DECOMPOSITION = 40
    BATCH_ORDER = 90
    POINTS_ASCENT = 91
    POINTS_START = 92


class BracketStream(Stream):
    """Of a bracket's noise."""

    LOGIT_DIFFERENCE = 0
    MARGIN = 1


class StartStream(Stream):
    """Of the noise of a random start in a threat."""

    L1_MAGNITUDE = 1
    RADIUS = 2


class GridStream(Stream):
    """Of the noise of a line that leaves the 8-bit grid; its start folds the same noise by the keys of StartStream."""

    BESIDE = 3


class SmoothingStream(Stream):
    """Of the noise of a smoothed classifier: each pair of votes draws its own, and the attack another."""

    SELECTION = 0
    VOTES = 1
    PROBE = 2
    COPIES = 3
    START = 4
    ATTACKED = 100, 1000  # the votes at adversarial images, by the number of the radius


class CorruptionStream(Stream):
    """Of the noise that corrupts images: one for each kind."""

    GAUSSIAN_NOISE = 0
    SHOT_NOISE = 1
    IMPULSE_NOISE = 2
    DEFOCUS_BLUR = 3
    GLASS_BLUR = 4
    MOTION_BLUR = 5
    ZOOM_BLUR = 6
    SNOW = 7
    FROST = 8
    FOG = 9
    BRIGHTNESS = 10
    CONTRAST = 11
    ELASTIC_TRANSFORM = 12
    PIXELATE = 13
    JPEG_COMPRESSION = 14


class CorruptionPart(Stream):
    """Of the noise of one kind of corruption, beside what it draws from its own."""

    DOWN = 0
    RIGHT = 1
    POINTS = 2
    WHITE = 3
    ANGLE = 4


class PatchStream(Stream):
    """Of the noise of the search for a patch."""

    PLACE = 0
    BEST = 1


class TrainingStream(Stream):
    """Of the noise of an epoch of training. Smaller keys belong to the inner attack."""

    AUGMENTATION = 10_000


class SquareStream(Stream):
    """Of the noise of the square attack, whose queries have the keys from 1."""

    START = 0


class SquareQueryStream(Stream):
    """Of the noise of one query of the square attack."""

    TOP = 1
    LEFT = 2
    SIGN = 3
    ORIENTATION = 4
