"""Square attack: random search with square updates. It reads logits alone, so gradient masking cannot mislead it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise, SquareQueryStream, SquareStream
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, should_drop_fooled, targeted_score, those

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the square's area is halved


def _side(query: int, height: int, width: int, p_init: float) -> int:
    """The side of the square at this query; its area is halved as the search goes on."""
    fraction = p_init / 2 ** sum(query > mark for mark in _HALVINGS)
    return max(1, min(round((fraction * height * width) ** 0.5), height, width))


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
    p_init: float = 0.8,
    target: Tensor | None = None,
) -> Tensor:
    """Square attack (Andriushchenko et al. 2020): random squares, kept where they increase the score.

    linf: the square is set to x +- eps, with one sign for each channel. l2: the square receives a new bump, with the
    norm that a second square gives up, so that the perturbation stays on the sphere. Every sample has its own square at
    every query. Arguments that are not listed here are those of ``pgd``.

    Args:
        threat: linf or l2.
        steps: number of queries, >= 1.
        p_init: the fraction of the image's area that the first square covers, in (0, 1].

    Returns:
        x_adv, (N, C, H, W), in the threat.

    Raises:
        UserError: for the l1 norm, for samples that are not (C, H, W) images, and for p_init outside (0, 1].
    """
    if threat.norm == "l1" or x.ndim != 4:
        raise UserError(
            f"square is defined for linf and l2 on (N, C, H, W) images, got {threat.norm}, {tuple(x.shape)}."
        )
    if not 0 < p_init <= 1:
        raise UserError(
            f"p_init, the fraction of the image that the first square covers, must lie in (0, 1], got {p_init}."
        )
    score_fn, target_fn = targeted_score(score, y, target)
    propose = _propose_linf if threat.norm == "linf" else _propose_l2
    best = MostAdversarial(x, y)
    rows = best.survivors()
    base = x
    x_adv = _start(x, threat, noise)
    out = predict(model, x_adv)
    value = score_fn(out, target_fn(rows))
    unbroken = best.update(rows, x_adv, out.logits)
    for query in range(1, steps):
        if should_drop_fooled(query, x):
            rows, base, x_adv, value = those(unbroken, rows, base, x_adv, value)
            if len(rows) == 0:
                break
        side = _side(query, x.shape[2], x.shape[3], p_init)
        proposed = propose(x_adv, base, threat, noise[rows].fold(query), side)
        out = predict(model, proposed)
        new_value = score_fn(out, target_fn(rows))
        unbroken = best.update(rows, proposed, out.logits)
        improved = new_value > value
        x_adv = torch.where(improved.view(-1, 1, 1, 1), proposed, x_adv)
        value = torch.where(improved, new_value, value)
    return best.x


def _start(x: Tensor, threat: Threat, noise: Noise) -> Tensor:
    """The first point: vertical stripes for linf, a tiling of bumps for l2."""
    channels, height, width = x.shape[1:]
    if threat.norm == "linf":
        return threat.project(x + threat.eps * noise.fold(SquareStream.START).sign((channels, 1, width), x.dtype), x)
    side = max(2, min(height, width) // 5)
    bump = _bump(side, x)
    n_rows, n_columns = -(-height // side), -(-width // side)
    tiles = bump.repeat(n_rows, n_columns)[:height, :width]
    signs = noise.fold(SquareStream.START).sign((channels, n_rows, n_columns), x.dtype)
    signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
    return threat.project(x + 1e6 * threat.eps * threat.ascent(tiles * signs), x)


def _window(noise: Noise, side: int, height: int, width: int, key: int) -> tuple[Tensor, Tensor]:
    """The row and column indices of each sample's own square, two (N, side)."""
    offsets = torch.arange(side, device=noise.index.device)
    top = noise.fold(SquareQueryStream.TOP, key).integers(height - side + 1)
    left = noise.fold(SquareQueryStream.LEFT, key).integers(width - side + 1)
    return top[:, None] + offsets, left[:, None] + offsets


def _mask(window: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """(N, 1, H, W) bool, true inside the square."""
    in_rows = torch.zeros(len(x), x.shape[2], dtype=torch.bool, device=x.device).scatter(1, window[0], True)
    in_columns = torch.zeros(len(x), x.shape[3], dtype=torch.bool, device=x.device).scatter(1, window[1], True)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _propose_linf(x_adv: Tensor, x: Tensor, threat: Threat, noise: Noise, side: int) -> Tensor:
    """x_adv with the square set to x +- eps."""
    inside = _mask(_window(noise, side, x.shape[2], x.shape[3], 0), x)
    signs = noise.fold(SquareQueryStream.SIGN).sign((x.shape[1], 1, 1), x.dtype)
    return threat.project(torch.where(inside, x + threat.eps * signs, x_adv), x)


def _bump(side: int, like: Tensor) -> Tensor:
    """(side, side) of norm 1: two halves of opposite sign, each largest at its center."""

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
    """x_adv with a new bump in one square and nothing in a second one; the norm of both goes to the bump."""
    channels, height, width = x.shape[1:]
    delta = x_adv - x
    window = _window(noise, side, height, width, 0)
    inside, cleared = _mask(window, x), _mask(_window(noise, side, height, width, 1), x)
    norm = delta.flatten(1).norm(dim=1)
    freed = (delta * (inside | cleared)).flatten(1).norm(dim=1)  # the norm of delta in both squares
    bump = _bump(side, x)
    upright = noise.fold(SquareQueryStream.ORIENTATION).sign((1, 1), x.dtype) > 0
    bump = torch.where(upright, bump, bump.T)
    signs = noise.fold(SquareQueryStream.SIGN).sign((channels, 1, 1), x.dtype)
    old = _cut(delta, window, side)
    old = old / old.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]
    new = bump[:, None] * signs + old
    new = new / new.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]
    budget = ((threat.eps**2 - norm.square()).clamp_min(0.0) + freed.square()).sqrt() / channels**0.5
    delta = delta.masked_fill(cleared | inside, 0.0)
    return threat.project(x + _paste(delta, budget.view(-1, 1, 1, 1) * new, window), x)


def _positions(window: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """(N, C, side * side): the flat positions of the square in each channel."""
    flat = window[0][:, :, None] * x.shape[3] + window[1][:, None, :]
    return flat.flatten(1)[:, None].expand(-1, x.shape[1], -1)


def _cut(delta: Tensor, window: tuple[Tensor, Tensor], side: int) -> Tensor:
    """The values in the square, (N, C, side, side)."""
    return delta.flatten(2).gather(2, _positions(window, delta)).unflatten(2, (side, side))


def _paste(delta: Tensor, patch: Tensor, window: tuple[Tensor, Tensor]) -> Tensor:
    """delta with the patch in the square."""
    return delta.flatten(2).scatter(2, _positions(window, delta), patch.flatten(2)).view_as(delta)
