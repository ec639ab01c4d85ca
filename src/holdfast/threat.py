"""The threat model: the norm ball around x intersected with the box of valid pixels. All norm geometry is here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, type_of, unknown
from .mapped import extremes
from .noise import Noise, StartStream
from .user_input import eps_text, number, read_number, text

NORMS = ("linf", "l2", "l1")
_WRITTEN = {"inf": "linf", "l_inf": "linf", "l-inf": "linf", "2": "l2", "l_2": "l2", "1": "l1", "l_1": "l1"}
NO_NORMS = ("corruptions", "rotation", "translation", "patch")  # threats of ``transforms``
LEAST_EPS = 1.2e-38  # float32 has no smaller number of full precision
TOLERANCE = 1e-5  # relative to eps: what `violation` forgives, besides the rounding of float32 pixels
SPARSITY = 0.02  # the fraction of pixels that one l1 step moves


def column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1), to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Threat:
    """All x_adv with ||x_adv - x|| <= eps and lo <= x_adv <= hi.

    Args:
        norm: "linf", "l2" or "l1", over all values of one sample.
        eps: radius, > 0, in units of the pixels (8/255 for images in [0, 1]).
        lo: the smallest valid pixel value. Every x must lie in [lo, hi].
        hi: the largest valid pixel value, > lo.

    Raises:
        UserError: for an unknown norm, a radius that is not a positive number, or an empty box.

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
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise unknown("norm", str(self.norm), NORMS)
        object.__setattr__(self, "eps", number("eps", self.eps, 0, above=True))
        if self.eps < LEAST_EPS:
            raise UserError(
                f"eps must be at least {LEAST_EPS:g}, the smallest that float32 pixels hold, got {self.eps}."
            )
        object.__setattr__(self, "lo", number("lo, an edge of the box of pixels,", self.lo))
        object.__setattr__(self, "hi", number("hi, an edge of the box of pixels,", self.hi))
        if not self.lo < self.hi:
            raise UserError(f"the box of pixels is empty: lo={self.lo} is not below hi={self.hi}.")

    @staticmethod
    def parse(written: str) -> Threat:
        """A threat from ``norm:eps``.

        Args:
            written: such as linf:0.1, linf:8/255 or l2:0.5; eps may be a fraction, and inf stands for linf.

        Returns:
            The threat, with the box [0, 1].

        Raises:
            UserError: for a text that cannot be read, and for an eps that covers the box.

        >>> Threat.parse("linf:8/255").eps == Threat.parse("inf:8.0/255").eps == 8 / 255
        True
        """
        norm, _, eps = text("threat", written).partition(":")
        value, norm = read_number(eps.strip()), norm.strip().lower()
        if norm in NO_NORMS:
            raise UserError(
                f"'{written}' is no norm ball, but a threat of `holdfast evaluate` and holdfast.transforms alone. Here "
                "it must be one such as linf:0.1."
            )
        if value is None:
            raise UserError(
                f"cannot read the threat '{written}': expected norm:eps, such as linf:0.1, linf:8/255 or l2:0.5."
            )
        threat = Threat(_WRITTEN.get(norm, norm), value)
        check_eps(threat)
        return threat

    def __str__(self) -> str:
        return f"{self.norm} {eps_text(self.eps)}"

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
        """The nearest point (Euclidean) to ``x_adv`` in the intersection of the ball around ``x`` with the box.

        Points inside come back unchanged. All three norms are exact to rounding: the intersection is convex, and its
        nearest point is found coordinate by coordinate, up to one number that makes the norm equal to eps.

        Args:
            x_adv: (N, ...).
            x: (N, ...) in the box.

        Returns:
            (N, ...).
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(self.lo, self.hi)
        clipped = x_adv.clamp(self.lo, self.hi)
        outside = self.size(clipped - x) > self.eps
        shrink = _shrink_l2 if self.norm == "l2" else _shrink_l1
        shrunk = (x + shrink(x_adv - x, x, self)).clamp(self.lo, self.hi)
        return torch.where(column(outside, x), shrunk, clipped)

    def ascent(self, grad: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """The steepest ascent direction: of norm 1, and zero where the gradient is zero.

        linf: sign(g). l2: g / ||g||_2. l1: sign(g) on the largest few coordinates, divided by their number (SLIDE,
        Tramer and Boneh 2019; a single coordinate is exact, but needs far more steps).

        Args:
            grad: (N, ...).
            x_adv: (N, ...), the current points; the l1 step then skips coordinates that the box stops.

        Returns:
            (N, ...), a new tensor.

        >>> Threat("l2", 1.0).ascent(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
        """
        if self.norm == "linf":
            return grad.sign()
        if self.norm == "l2":
            # Divide by the largest entry first: the square of a gradient of 1e-30 would underflow.
            scaled = grad / column(grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)
            return scaled / column(self.size(scaled).clamp_min(1e-12), grad)
        if x_adv is not None:
            stopped = ((grad > 0) & (x_adv >= self.hi)) | ((grad < 0) & (x_adv <= self.lo))
            grad = grad.masked_fill(stopped, 0.0)
        return _sparse_direction(grad.flatten(1)).view_as(grad)

    def dual_size(self, grad: Tensor) -> Tensor:
        """||grad|| of each sample in the dual norm: what a linear score gains in a step of norm 1. (N, ...) -> (N,).

        >>> Threat("linf", 1.0).dual_size(torch.tensor([[3.0, -4.0]]))
        tensor([7.])
        """
        return Threat({"linf": "l1", "l2": "l2", "l1": "linf"}[self.norm], 1.0).size(grad)

    def to_plane(self, x: Tensor, grad: Tensor, need: Tensor) -> Tensor:
        """The smallest step r, in the threat's norm, with grad . r = need and x + r in the box.

        linf: r = sign min(t, room). l2: r = sign min(t |grad|, room). room is the distance to the edge of the box.
        grad . r is piecewise linear and increasing in t, so t is exact after one sort. l1: the pixels with the largest
        gradients first, each moved to the edge of the box.

        Args:
            x: (N, ...) in the box.
            grad: (N, ...).
            need: (N,).

        Returns:
            (N, ...). Where no such step exists in the box, the step goes as far as the box allows.

        Source: Croce and Hein 2020, section 3.1.

        >>> r = Threat("l2", 1.0, -9, 9).to_plane(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))
        >>> [round(float(value), 4) for value in r[0]]
        [0.6, 0.8]
        >>> Threat("linf", 1.0, -9, 0.5).to_plane(torch.zeros(1, 2), torch.tensor([[1.0, 4.0]]), torch.tensor([3.0]))
        tensor([[0.5000, 0.5000]])
        """
        flat, need_sign = grad.flatten(1), torch.where(need < 0, -1.0, 1.0).to(grad.dtype)
        sign = flat.sign() * need_sign[:, None]
        largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        slope, need = flat.abs() / largest, (need.abs() / largest[:, 0]).clamp_max(1e30)
        room = torch.where(sign > 0, self.hi - x.flatten(1), x.flatten(1) - self.lo).clamp_min(0.0)
        if self.norm == "l1":
            size = _moves_in_turn(slope, room, need)
        else:
            size = _moves_together(torch.ones_like(slope) if self.norm == "linf" else slope, slope, room, need)
        return (sign * size).nan_to_num(0.0, 0.0, 0.0).view_as(x)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """A point drawn uniformly from the ball, then clipped to the box.

        linf: uniform in the cube. l2: a normal direction times U^(1/d). l1: signed exponentials likewise.

        Args:
            x: (N, ...) in the box.
            noise: the noise of these samples.

        Returns:
            (N, ...).
        """
        shape = tuple(x.shape[1:])
        if self.norm == "linf":
            delta = (noise.uniform(shape, x.dtype) * 2 - 1) * self.eps
        else:
            if self.norm == "l2":
                direction = noise.normal(shape, x.dtype)
            else:
                magnitude = -noise.fold(StartStream.L1_MAGNITUDE).uniform(shape, x.dtype).log()
                direction = noise.sign(shape, x.dtype) * magnitude
            radius = self.eps * noise.fold(StartStream.RADIUS).uniform((), x.dtype) ** (1 / math.prod(shape))
            delta = direction * column(radius / self.size(direction).clamp_min(1e-30), x)
        return (x + delta).clamp(self.lo, self.hi)

    def violation(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """By how much each x_adv violates the threat, in pixel units.

        A relative ``TOLERANCE`` of eps and the rounding of float32 pixels are forgiven, and nothing else.

        Args:
            x_adv: (N, ...).
            x: (N, ...).

        Returns:
            (N,), 0 where the threat is kept and infinite for NaN.
        """
        allowed = self.eps * (1 + TOLERANCE) + self._rounding(math.prod(x.shape[1:]))
        over = (self.size(x_adv - x) - allowed).clamp_min(0.0)
        outside = torch.maximum(self.lo - x_adv, x_adv - self.hi).flatten(1).amax(1).clamp_min(0.0)
        return torch.maximum(over, outside).nan_to_num(nan=math.inf)

    def farthest(self, dim: int) -> float:
        """The largest distance to x, in the threat's norm, of any x_adv that ``violation`` forgives: for proofs.

        It exceeds eps by the tolerance, by the rounding of pixels, and by what float32 may lose when it sums up a norm.

        Args:
            dim: number of values of a sample.

        Returns:
            A float.

        >>> 0.1 < Threat("linf", 0.1).farthest(784) < 0.10001 and 1 < Threat("l2", 1.0).farthest(784) < 1.0001
        True
        """
        summing = 0.0 if self.norm == "linf" else (dim + 2) * 2.0**-24
        return self.eps * (1 + TOLERANCE) * (1 + summing) + 2 * self._rounding(dim)

    def _rounding(self, dim: int) -> float:
        """What the rounding of float32 pixels can add to a norm."""
        pixel = torch.finfo(torch.float32).eps * max(abs(self.lo), abs(self.hi))
        return pixel * {"linf": 1.0, "l2": math.sqrt(dim), "l1": dim}[self.norm]

    def describe(self) -> dict[str, float | str]:
        """The threat as a dict for JSON."""
        return {"norm": self.norm, "eps": self.eps, "lo": self.lo, "hi": self.hi}


def check_images(x: Tensor, threat: Threat) -> None:
    """Refuse images outside the box, and an eps that covers it: bounds and attacks around them mean nothing.

    Args:
        x: (N, ...) images; uint8 counts as its values over 255.
        threat: whose box [lo, hi] they must lie in.

    Raises:
        UserError: for values outside the box, up to rounding, for NaN, and as ``check_eps`` does.

    >>> check_images(torch.tensor([[0.0, 1.0]]), Threat("linf", 0.1))
    """
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    lowest, highest = (value / scale for value in extremes(x)) if x.numel() else (threat.lo, threat.hi)
    if not (threat.lo <= lowest + 1e-6 and highest - 1e-6 <= threat.hi):
        raise UserError(
            f"images must lie in the threat's box [{threat.lo:g}, {threat.hi:g}], got values from {lowest:.4g} to "
            f"{highest:.4g}. Scale them to it; normalisation belongs inside the model."
        )
    check_eps(threat, math.prod(x.shape[1:]))


def _sparse_direction(grad: Tensor) -> Tensor:
    """The signs of the largest few coordinates of (N, D), divided by their number; zero elsewhere."""
    top = grad.abs().topk(max(1, math.ceil(SPARSITY * grad.shape[1])), dim=1).indices
    step = torch.zeros_like(grad).scatter(1, top, grad.gather(1, top).sign())
    return step / step.abs().sum(1, keepdim=True).clamp_min(1.0)


def _moves_in_turn(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """How far each pixel moves, (N, D), to gain what is needed: those of the largest slope first, each to its edge."""
    order = slope.sort(dim=1, descending=True, stable=True).indices
    slope, room = slope.gather(1, order), room.gather(1, order)
    gain = slope * room
    before = gain.cumsum(1) - gain
    move = ((need[:, None] - before).clamp_min(0.0) / slope).nan_to_num(0.0).minimum(room)
    return torch.zeros_like(move).scatter(1, order, move)


def _moves_together(speed: Tensor, slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """How far each pixel moves, (N, D), to gain what is needed: all at their own speed, until the box stops them."""
    # The t at which each pixel reaches the edge of the box.
    stops = torch.where(speed > 0, room / speed, math.inf).sort(dim=1, stable=True)
    gain, rate = (slope * room).gather(1, stops.indices), (slope * speed).gather(1, stops.indices)
    stopped_gain = gain.cumsum(1)
    moving_rate = rate.flip(1).cumsum(1).flip(1)  # of this pixel and all that stop later
    # A pixel stops before the solution if the total gain at its stop is less than needed.
    total = stopped_gain - gain + moving_rate * stops.values
    n_stopped = (total < need[:, None]).sum(1, keepdim=True)
    zero = torch.zeros_like(need)[:, None]
    stopped_gain = torch.cat([zero, stopped_gain], 1).gather(1, n_stopped)
    moving_rate = torch.cat([moving_rate, zero], 1).gather(1, n_stopped)
    t = ((need[:, None] - stopped_gain).clamp_min(0.0) / moving_rate.clamp_min(1e-30)).clamp_max(1e30)
    return (t * speed).minimum(room)


def as_threat(threat: Any) -> Threat:
    """The threat that an argument is: a Threat as it is, a text as ``Threat.parse`` reads it.

    Args:
        threat: what a caller gave.

    Returns:
        The threat.

    Raises:
        UserError: for anything else, and as ``Threat.parse`` does.

    >>> as_threat("l2:0.5") == as_threat(Threat("l2", 0.5))
    True
    """
    if isinstance(threat, str):
        return Threat.parse(threat)
    if not isinstance(threat, Threat):
        raise UserError(f'the threat must be a Threat or a text such as "linf:8/255", got {type_of(threat)}.')
    return threat


def check_eps(threat: Threat, dim: float = math.inf) -> None:
    """Refuse an eps under which every image of the box is allowed: most often it is in another unit.

    Attacks and checks may still build such a threat for themselves.

    Args:
        threat: the threat that a user chose.
        dim: number of values of a sample; where it is not known, only linf can be judged.

    Raises:
        UserError: if the ball around any x covers the box.

    >>> check_eps(Threat("linf", 8))
    Traceback (most recent call last):
    holdfast.errors.UserError: linf eps 8 covers all pixels in [0, 1]: any image is allowed. Did you mean 8/255?
    """
    width = threat.hi - threat.lo
    if threat.eps < width * {"linf": 1.0, "l2": math.sqrt(dim), "l1": dim}[threat.norm]:
        return
    box = f"[{threat.lo:g}, {threat.hi:g}]"
    hint = f"Did you mean {threat.eps:g}/255?" if threat.eps / 255 < width else "Choose a smaller one."
    raise UserError(f"{threat.norm} eps {threat.eps:g} covers all pixels in {box}: any image is allowed. {hint}")


def _shrink_l2(v: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The perturbation nearest to v of l2 norm at most eps that keeps x in the box."""
    # The minimiser is clip(t v) for one t in (0, 1]. With the set of clipped coordinates fixed, t has a
    # closed form; repeating this gives a sequence that increases to the solution and never exceeds it. A few rounds
    # suffice, unless the box stops the coordinates one by one. Bisection bounds those cases.
    low, high, eps2 = threat.lo - x, threat.hi - x, threat.eps**2
    v2 = v.square()
    t = (threat.eps / threat.size(v).clamp_min(1e-30)).clamp_max(1.0)
    upper = torch.ones_like(t)  # t <= solution <= upper
    for _ in range(16):
        delta = torch.minimum(torch.maximum(column(t, v) * v, low), high)
        free = delta == column(t, v) * v
        clipped_square = torch.where(free, 0.0, delta.square()).flatten(1).sum(1)
        free_square = torch.where(free, v2, 0.0).flatten(1).sum(1)
        root = ((eps2 - clipped_square).clamp_min(0.0) / free_square.clamp_min(1e-30)).sqrt()
        before, t = t, torch.maximum(t, torch.minimum(root, upper))
        moved = t > before  # a converged sample does not change, whatever happens in its batch
        if v.device.type == "cpu" and not bool(moved.any()):
            break
        middle = (t + upper) / 2
        fits = threat.size(torch.minimum(torch.maximum(column(middle, v) * v, low), high)) <= threat.eps
        t, upper = torch.where(moved & fits, middle, t), torch.where(fits, upper, middle)
    delta = torch.minimum(torch.maximum(column(t, v) * v, low), high)
    return delta * column((threat.eps / threat.size(delta).clamp_min(1e-30)).clamp_max(1.0), v)


def _shrink_l1(v: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The perturbation nearest to v of l1 norm at most eps that keeps x in the box."""
    # The minimiser is sign(v) min(max(|v| - t, 0), room) for one t >= 0. Bisection ends on the feasible side.
    room = torch.where(v > 0, threat.hi - x, x - threat.lo)
    size = v.abs()
    low = torch.zeros(len(v), dtype=v.dtype, device=v.device)
    high = size.flatten(1).amax(1)
    for _ in range(40):
        middle = (low + high) / 2
        norm = torch.minimum((size - column(middle, v)).clamp_min(0.0), room).flatten(1).sum(1)
        too_big = norm > threat.eps
        low, high = torch.where(too_big, middle, low), torch.where(too_big, high, middle)
    delta = torch.minimum((size - column(high, v)).clamp_min(0.0), room)
    return v.sign() * delta
