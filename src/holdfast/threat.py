"""What the adversary may do: the norm ball around x, cut with the box of valid pixels. The only norm geometry here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .errors import UserError, unknown
from .noise import Noise

NORMS = ("linf", "l2", "l1")
TOLERANCE = 1e-5  # relative to eps, plus the rounding of a pixel in float32: what `violation` forgives
SPARSITY = 0.02  # the share of pixels that one l1 step moves


def column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1), to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Threat:
    """All x_adv with ||x_adv - x|| <= eps and lo <= x_adv <= hi.

    Args:
        norm: "linf", "l2" or "l1", over all values of one sample.
        eps: radius, > 0, in units of the pixels (8/255 for images in [0, 1]).
        lo, hi: the box of valid pixel values, lo < hi. Every x must lie in it.

    Raises UserError for an unknown norm, a radius that is not a positive number, or an empty box.

    >>> Threat("linf", 0.1)
    Threat(norm='linf', eps=0.1, lo=0.0, hi=1.0)
    >>> threat, x = Threat("l2", 1.0, lo=-9, hi=9), torch.zeros(1, 2)
    >>> threat.project(torch.tensor([[3.0, 4.0]]), x)
    tensor([[0.6000, 0.8000]])
    """

    norm: str
    eps: float
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", str(self.norm), NORMS)
        if not (isinstance(self.eps, (int, float)) and 0 < self.eps < math.inf):
            raise UserError(f"eps must be a positive finite number, got {self.eps!r}. Clean accuracy needs no threat.")
        if not -math.inf < self.lo < self.hi < math.inf:
            raise UserError(f"the box of pixels is empty: lo={self.lo} is not below hi={self.hi}.")

    @staticmethod
    def parse(text: str) -> Threat:
        """A threat from ``norm:eps``; eps may be a fraction.

        >>> Threat.parse("linf:8/255").eps == 8 / 255
        True
        """
        norm, _, eps = text.partition(":")
        try:
            value = float(Fraction(eps.strip()))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise UserError(
                f"cannot read the threat '{text}': expected norm:eps, such as linf:0.1, linf:8/255 or l2:0.5."
            ) from None
        return Threat(norm.strip().lower(), value)

    def __str__(self) -> str:
        return f"{self.norm} {self.eps:.4g}"

    def size(self, delta: Tensor) -> Tensor:
        """||delta|| of each sample: (N, ...) -> (N,).

        >>> Threat("l1", 1.0).size(torch.tensor([[3.0, -4.0]]))
        tensor([7.])
        """
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.norm(p=2 if self.norm == "l2" else 1, dim=1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point (Euclidean) to ``x_adv`` in the ball around ``x`` cut with the box.

        Inside points come back as they are. All three norms are exact to rounding: the cut of ball and box is
        convex and its nearest point is found coordinate by coordinate, up to one number that makes the size eps.
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(self.lo, self.hi)
        clipped = x_adv.clamp(self.lo, self.hi)
        far = self.size(clipped - x) > self.eps
        shrink = self._shrink_l2 if self.norm == "l2" else self._shrink_l1
        shrunk = (x + shrink(x_adv - x, x)).clamp(self.lo, self.hi)
        return torch.where(column(far, x), shrunk, clipped)

    def _shrink_l2(self, v: Tensor, x: Tensor) -> Tensor:
        # The minimiser is clip(t v) for one t in (0, 1]. Fixing the clipped set and solving for t gives a sequence that
        # rises to the answer and never passes it: a few rounds suffice, unless the box stops coordinates one by one.
        # Halving the interval as well bounds those cases. On the CPU it ends where t stopped moving.
        low, high, eps2 = self.lo - x, self.hi - x, self.eps**2
        v2 = v.square()
        t = (self.eps / self.size(v).clamp_min(1e-30)).clamp_max(1.0)
        below = torch.ones_like(t)  # t <= answer <= below
        for _ in range(16):
            delta = torch.minimum(torch.maximum(column(t, v) * v, low), high)
            free = delta == column(t, v) * v
            held = torch.where(free, 0.0, delta.square()).flatten(1).sum(1)
            loose = torch.where(free, v2, 0.0).flatten(1).sum(1)
            root = ((eps2 - held).clamp_min(0.0) / loose.clamp_min(1e-30)).sqrt()
            before, t = t, torch.maximum(t, torch.minimum(root, below))
            moved = t > before  # a sample that has settled stays as it is, whatever its batch mates do
            if v.device.type == "cpu" and not bool(moved.any()):
                break
            middle = (t + below) / 2
            fits = self.size(torch.minimum(torch.maximum(column(middle, v) * v, low), high)) <= self.eps
            t, below = torch.where(moved & fits, middle, t), torch.where(fits, below, middle)
        delta = torch.minimum(torch.maximum(column(t, v) * v, low), high)
        return delta * column((self.eps / self.size(delta).clamp_min(1e-30)).clamp_max(1.0), v)

    def _shrink_l1(self, v: Tensor, x: Tensor) -> Tensor:
        # The minimiser is sign(v) min(max(|v| - t, 0), room) for one t >= 0; bisection, ending on the feasible side.
        room = torch.where(v > 0, self.hi - x, x - self.lo)
        size = v.abs()
        low = torch.zeros(len(v), dtype=v.dtype, device=v.device)
        high = size.flatten(1).amax(1)
        for _ in range(40):
            middle = (low + high) / 2
            kept = torch.minimum((size - column(middle, v)).clamp_min(0.0), room).flatten(1).sum(1)
            too_big = kept > self.eps
            low, high = torch.where(too_big, middle, low), torch.where(too_big, high, middle)
        delta = torch.minimum((size - column(high, v)).clamp_min(0.0), room)
        return v.sign() * delta

    def ascent(self, grad: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """The direction of size 1 in which a linear score rises: (N, ...) -> (N, ...); zero where the gradient is.

        linf: sign(g).  l2: g / ||g||_2.  l1: sign(g) on the largest few coordinates, divided by their number (SLIDE,
        Tramer and Boneh 2019: one coordinate at a time is exact but hopelessly slow). With ``x_adv`` the l1 step
        passes over coordinates that the box already stops.

        >>> Threat("l2", 1.0).ascent(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
        """
        if self.norm == "linf":
            return grad.sign()
        if self.norm == "l2":
            # Divided by the largest entry first: the square of a gradient of 1e-30 would vanish.
            scaled = grad / column(grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)
            return scaled / column(self.size(scaled).clamp_min(1e-12), grad)
        if x_adv is not None:
            stopped = ((grad > 0) & (x_adv >= self.hi)) | ((grad < 0) & (x_adv <= self.lo))
            grad = grad.masked_fill(stopped, 0.0)
        flat = grad.flatten(1)
        count = max(1, math.ceil(SPARSITY * flat.shape[1]))
        top = flat.abs().topk(count, dim=1).indices
        step = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
        return (step / step.abs().sum(1, keepdim=True).clamp_min(1.0)).view_as(grad)

    def dual_size(self, grad: Tensor) -> Tensor:
        """||grad|| of each sample in the dual norm, how far a linear score rises in a step of size 1: (N, ...) -> (N,).

        >>> Threat("linf", 1.0).dual_size(torch.tensor([[3.0, -4.0]]))
        tensor([7.])
        """
        return Threat({"linf": "l1", "l2": "l2", "l1": "linf"}[self.norm], 1.0).size(grad)

    def to_plane(self, x: Tensor, slope: Tensor, need: Tensor) -> Tensor:
        """The smallest r, in the threat's norm, with slope . r = need and x + r in the box; (N, ...), (N, ...), (N,).

        linf: r = sign min(t, room).  l2: r = sign min(t |slope|, room), room being the way to the wall. What t gains is
        piecewise linear and rising, so t is exact after one sort.  l1: the steepest pixels first, each to its wall.
        Where the box holds no such r it goes as far as the box lets it. Source: Croce and Hein 2020, section 3.1.

        >>> r = Threat("l2", 1.0, -9, 9).to_plane(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))
        >>> [round(float(value), 4) for value in r[0]]
        [0.6, 0.8]
        >>> Threat("linf", 1.0, -9, 0.5).to_plane(torch.zeros(1, 2), torch.tensor([[1.0, 4.0]]), torch.tensor([3.0]))
        tensor([[0.5000, 0.5000]])
        """
        flat, need_sign = slope.flatten(1), torch.where(need < 0, -1.0, 1.0).to(slope.dtype)
        sign = flat.sign() * need_sign[:, None]
        top = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        steep, need = flat.abs() / top, (need.abs() / top[:, 0]).clamp_max(1e30)
        room = torch.where(sign > 0, self.hi - x.flatten(1), x.flatten(1) - self.lo).clamp_min(0.0)
        if self.norm == "l1":
            order = steep.sort(dim=1, descending=True, stable=True).indices
            steep, wall = steep.gather(1, order), room.gather(1, order)
            gain = steep * wall
            before = gain.cumsum(1) - gain
            move = ((need[:, None] - before).clamp_min(0.0) / steep).nan_to_num(0.0).minimum(wall)
            size = torch.zeros_like(move).scatter(1, order, move)
        else:
            speed = torch.ones_like(steep) if self.norm == "linf" else steep
            ends = torch.where(speed > 0, room / speed, math.inf).sort(
                dim=1, stable=True
            )  # the t that stops each pixel
            gain, rate = (steep * room).gather(1, ends.indices), (steep * speed).gather(1, ends.indices)
            held = gain.cumsum(1)
            loose = rate.flip(1).cumsum(1).flip(1)  # of this pixel and all that stop later
            # Gained by the time that each pixel stops; what lies below the need has stopped at the answer.
            stopped = ((held - gain + loose * ends.values) < need[:, None]).sum(1, keepdim=True)
            nothing = torch.zeros_like(need)[:, None]
            held = torch.cat([nothing, held], 1).gather(1, stopped)
            loose = torch.cat([loose, nothing], 1).gather(1, stopped)
            t = ((need[:, None] - held).clamp_min(0.0) / loose.clamp_min(1e-30)).clamp_max(1e30)
            size = (t * speed).minimum(room)
        return (sign * size).nan_to_num(0.0, 0.0, 0.0).view_as(x)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """A point drawn uniformly from the ball, then put into the box: (N, ...) -> (N, ...).

        linf: uniform in the cube.  l2: a normal direction times U^(1/d).  l1: signed exponentials likewise.
        """
        shape = tuple(x.shape[1:])
        if self.norm == "linf":
            delta = (noise.uniform(shape, x.dtype) * 2 - 1) * self.eps
        else:
            if self.norm == "l2":
                direction = noise.normal(shape, x.dtype)
            else:
                direction = noise.sign(shape, x.dtype) * -noise.fold(1).uniform(shape, x.dtype).log()
            radius = self.eps * noise.fold(2).uniform((), x.dtype) ** (1 / math.prod(shape))
            delta = direction * column(radius / self.size(direction).clamp_min(1e-30), x)
        return (x + delta).clamp(self.lo, self.hi)

    def violation(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """By how much each x_adv breaks the rules, in pixel units: (N,), 0 where it does not; NaN counts as infinite.

        Forgives a relative ``TOLERANCE`` of eps and the rounding of float32 pixels, and nothing else.
        """
        allowed = self.eps * (1 + TOLERANCE) + self._rounding(math.prod(x.shape[1:]))
        over = (self.size(x_adv - x) - allowed).clamp_min(0.0)
        outside = torch.maximum(self.lo - x_adv, x_adv - self.hi).flatten(1).amax(1).clamp_min(0.0)
        return torch.maximum(over, outside).nan_to_num(nan=math.inf)

    def farthest(self, dim: int) -> float:
        """No x_adv with ``dim`` values that ``violation`` forgives is farther from x, in the threat's norm: for proofs.

        More than eps by the tolerance, the rounding of pixels, and what float32 may lose while it sums up a size.

        >>> 0.1 < Threat("linf", 0.1).farthest(784) < 0.10001 and 1 < Threat("l2", 1.0).farthest(784) < 1.0001
        True
        """
        summing = 0.0 if self.norm == "linf" else (dim + 2) * 2.0**-24
        return self.eps * (1 + TOLERANCE) * (1 + summing) + 2 * self._rounding(dim)

    def _rounding(self, dim: int) -> float:
        """What float32 pixels can add to a size."""
        pixel = torch.finfo(torch.float32).eps * max(abs(self.lo), abs(self.hi))
        return pixel * {"linf": 1.0, "l2": math.sqrt(dim), "l1": dim}[self.norm]

    def describe(self) -> dict[str, float | str]:
        """The threat as JSON holds it."""
        return {"norm": self.norm, "eps": self.eps, "lo": self.lo, "hi": self.hi}
