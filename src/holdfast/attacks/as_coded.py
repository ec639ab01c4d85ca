"""The attack of the only public code that we know under the name of the I-SCE paper."""

from __future__ import annotations

from torch import Tensor

from ..errors import unknown
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, attack, predict
from .pgd import pgd

AWAY_FROM = ("predicted", "true")


@attack
def as_coded(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 5,
    step_size: float | None = None,
    away_from: str = "predicted",
    iterate: str = "last",
) -> Tensor:
    """Steps of sign(gradient) from x, away from the class that is predicted for x; the last one is the answer.

        x_adv <- project(x_adv + step_size sign(gradient of score(model(x_adv), argmax model(x))))

    That code does not project: under its "eps", k steps of a reach k a. An attack returns points of its threat, so this
    one projects; it is that code's step for step in the threat that is the whole box of pixels, and nowhere else. See
    ``holdfast.experiments.as_coded.unprojected``, which measures it so.

    Args:
        steps: k >= 1.
        step_size: a > 0, in pixels; default eps, which is a step size there.
        away_from: "predicted", as in that code, also where the prediction is wrong; or "true": y.
        iterate: "last", as in that code; or "best": the most adversarial point for the labels in use.

    Returns:
        x_adv, (N, C, H, W), in the threat.

    Raises:
        UserError: another away_from or iterate.

    Where it fails: a misclassified image is driven away from its wrong class, often into the right one, and counts as
        correct afterwards. Steps of eps jump between corners of the ball.

    >>> import torch
    >>> from holdfast.losses import negative_margin
    >>> model = lambda x: torch.cat([x.flatten(1), -x.flatten(1)], 1)  # the first class while x > 0
    >>> x, noise = torch.full((1, 1, 1, 1), 0.25), Noise(0, torch.arange(1))
    >>> few = {"score": negative_margin, "noise": noise, "steps": 2, "step_size": 0.25}
    >>> for y, eps in ((0, 0.25), (0, 2.0), (1, 2.0)):
    ...     print(as_coded(model, x, torch.tensor([y]), Threat("linf", eps, -1, 1), **few).item())
    0.0
    -0.25
    -0.25
    """
    if away_from not in AWAY_FROM:
        raise unknown("class to move away from", away_from, AWAY_FROM)
    fixed = predict(model, x).logits.argmax(1) if away_from == "predicted" else y
    step_size = threat.eps if step_size is None else step_size
    return pgd(
        model, x, fixed, threat, score=score, noise=noise, steps=steps, step_size=step_size, random_start=False,
        iterate=iterate,
    )  # fmt: skip
