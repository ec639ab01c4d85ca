"""Random points of the threat: the baseline that every other attack must beat."""

from __future__ import annotations

from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, should_drop_fooled, those


@attack
def random_noise(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, steps: int = 100
) -> Tensor:
    """The most adversarial of ``steps`` random points, alternately inside and on the surface of the ball.

    It must be the weakest attack: a network on which it beats a gradient attack hides its gradients. Arguments that are
    not listed here are those of ``pgd``.

    Args:
        score: not used.
        steps: number of points, >= 1.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    best = MostAdversarial(x, y)
    rows = best.survivors()
    for step in range(steps):
        stream = noise[rows].fold(step)
        x_adv = threat.random_start(x[rows], stream)
        if step % 2:
            x_adv = threat.project(x[rows] + 2 * threat.eps * threat.ascent(stream.normal(tuple(x.shape[1:]))), x[rows])
        unbroken = best.update(rows, x_adv, predict(model, x_adv).logits)
        if should_drop_fooled(step, x):
            (rows,) = those(unbroken, rows)
            if len(rows) == 0:
                break
    return best.x
