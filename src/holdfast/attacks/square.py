"""Attacks that ask for answers only: they do not see gradients, so no gradient can lie to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, should_drop_fooled, targeted_score

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the square's area is halved


@attack
def random_noise(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, steps: int = 100
) -> Tensor:
    """The worst of ``steps`` random points, inside and on the surface in turn. It must be the weakest attack.

    Args: as for ``pgd``; the score is not used. Returns x_adv, (N, C, H, W).
    """
    worst = MostAdversarial(x, y)
    rows = worst.standing()
    for step in range(steps):
        stream = noise[rows].fold(step)
        x_adv = threat.random_start(x[rows], stream)
        if step % 2:
            x_adv = threat.project(x[rows] + 2 * threat.eps * threat.ascent(stream.normal(tuple(x.shape[1:]))), x[rows])
        stands = worst.see(rows, x_adv, predict(model, x_adv).logits)
        if should_drop_fooled(step, x):
            rows = rows[stands]
            if len(rows) == 0:
                break
    return worst.x


def _side(query: int, height: int, width: int, first: float) -> int:
    """The side of the square at this query: a share of the area that halves as the search goes on."""
    share = first / 2 ** sum(query > mark for mark in _HALVINGS)
    return max(1, min(round((share * height * width) ** 0.5), height, width))


@attack
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 1000,
    first: float = 0.8,
    target: Tensor | None = None,
) -> Tensor:
    """Square attack (Andriushchenko et al. 2020): random squares, kept where the score rises. linf and l2.

    linf: the square becomes x +- eps, one sign a channel. l2: the square takes a new bump and all the size that another
    square gives up, so the perturbation stays on the sphere. Each sample has its own square at every query.

    Args: as for ``pgd``; steps: queries; first: the first square's share of the image's area, in (0, 1].
    Returns x_adv, (N, C, H, W). Raises UserError for the l1 norm and for samples that are not (C, H, W) images.
    """
    if threat.norm == "l1" or x.ndim != 4:
        raise UserError(
            f"square is defined for linf and l2 on (N, C, H, W) images, got {threat.norm}, {tuple(x.shape)}."
        )
    if not 0 < first <= 1:
        raise UserError(f"first, the first square's share of the image, must lie in (0, 1], got {first}.")
    climb, goal = targeted_score(score, y, target)
    propose = _propose_linf if threat.norm == "linf" else _propose_l2
    worst = MostAdversarial(x, y)
    rows = worst.standing()
    base = x
    x_adv = _start(x, threat, noise)
    out = predict(model, x_adv)
    value = climb(out, goal(rows))
    stands = worst.see(rows, x_adv, out.logits)
    for query in range(1, steps):
        if should_drop_fooled(query, x):
            rows, base, x_adv, value = (t[stands] for t in (rows, base, x_adv, value))
            if len(rows) == 0:
                break
        side = _side(query, x.shape[2], x.shape[3], first)
        proposed = propose(x_adv, base, threat, noise[rows].fold(query), side)
        out = predict(model, proposed)
        height = climb(out, goal(rows))
        stands = worst.see(rows, proposed, out.logits)
        rises = height > value
        x_adv = torch.where(rises.view(-1, 1, 1, 1), proposed, x_adv)
        value = torch.where(rises, height, value)
    return worst.x


def _start(x: Tensor, threat: Threat, noise: Noise) -> Tensor:
    channels, height, width = x.shape[1:]
    if threat.norm == "linf":  # vertical stripes
        return threat.project(x + threat.eps * noise.fold(0).sign((channels, 1, width), x.dtype), x)
    side = max(2, min(height, width) // 5)
    bump = _bump(side, x)
    down, across = -(-height // side), -(-width // side)
    tiles = bump.repeat(down, across)[:height, :width]
    signs = noise.fold(0).sign((channels, down, across), x.dtype)
    signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
    return threat.project(x + 1e6 * threat.eps * threat.ascent(tiles * signs), x)


def _window(noise: Noise, side: int, height: int, width: int, key: int) -> tuple[Tensor, Tensor]:
    """Row and column numbers of each sample's own square: two (N, side)."""
    reach = torch.arange(side, device=noise.index.device)
    top = noise.fold(1, key).integers(height - side + 1)
    left = noise.fold(2, key).integers(width - side + 1)
    return top[:, None] + reach, left[:, None] + reach


def _mask(window: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """(N, 1, H, W): true inside the square."""
    down = torch.zeros(len(x), x.shape[2], dtype=torch.bool, device=x.device).scatter(1, window[0], True)
    across = torch.zeros(len(x), x.shape[3], dtype=torch.bool, device=x.device).scatter(1, window[1], True)
    return (down[:, :, None] & across[:, None, :])[:, None]


def _propose_linf(x_adv: Tensor, x: Tensor, threat: Threat, noise: Noise, side: int) -> Tensor:
    inside = _mask(_window(noise, side, x.shape[2], x.shape[3], 0), x)
    signs = noise.fold(3).sign((x.shape[1], 1, 1), x.dtype)
    return threat.project(torch.where(inside, x + threat.eps * signs, x_adv), x)


def _bump(side: int, like: Tensor) -> Tensor:
    """(side, side) of size 1: two half-patterns of opposite sign, each falling off from its middle."""

    def peak(height: int, width: int) -> Tensor:
        rows = torch.arange(height, device=like.device) - (height - 1) / 2
        columns = torch.arange(width, device=like.device) - (width - 1) / 2
        return 1 / (1 + torch.maximum(rows.abs()[:, None], columns.abs()[None, :]).to(like.dtype)).square()

    if side == 1:
        return torch.ones(1, 1, dtype=like.dtype, device=like.device)
    half = side // 2
    bump = torch.cat([peak(half, side), -peak(side - half, side)])
    return bump / bump.norm()


def _propose_l2(x_adv: Tensor, x: Tensor, threat: Threat, noise: Noise, side: int) -> Tensor:
    channels, height, width = x.shape[1:]
    delta = x_adv - x
    here = _window(noise, side, height, width, 0)
    inside, given = _mask(here, x), _mask(_window(noise, side, height, width, 1), x)
    size = delta.flatten(1).norm(dim=1)
    freed = (delta * (inside | given)).flatten(1).norm(dim=1)  # what both squares held
    bump = _bump(side, x)
    bump = torch.where((noise.fold(4).sign((1, 1), x.dtype) > 0), bump, bump.T)  # upright or lying
    signs = noise.fold(3).sign((channels, 1, 1), x.dtype)
    old = _cut(delta, here, side)
    old = old / old.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]
    fresh = bump[:, None] * signs + old
    fresh = fresh / fresh.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]
    budget = ((threat.eps**2 - size.square()).clamp_min(0.0) + freed.square()).sqrt() / channels**0.5
    delta = delta.masked_fill(given | inside, 0.0)
    return threat.project(x + _paste(delta, budget.view(-1, 1, 1, 1) * fresh, here), x)


def _places(window: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """(N, C, side * side): the flat positions of the square in each channel."""
    flat = window[0][:, :, None] * x.shape[3] + window[1][:, None, :]
    return flat.flatten(1)[:, None].expand(-1, x.shape[1], -1)


def _cut(delta: Tensor, window: tuple[Tensor, Tensor], side: int) -> Tensor:
    return delta.flatten(2).gather(2, _places(window, delta)).unflatten(2, (side, side))


def _paste(delta: Tensor, patch: Tensor, window: tuple[Tensor, Tensor]) -> Tensor:
    return delta.flatten(2).scatter(2, _places(window, delta), patch.flatten(2)).view_as(delta)
