"""What the minimum-norm attacks share: DeepFool, C&W, L-BFGS, FMN and FAB.

A minimum-norm attack looks for the smallest perturbation that fools the model, and applies the threat's radius at the
end. It keeps the nearest adversarial example that it has seen. Where that point lies in the threat it is returned; for
the other samples the attack returns the more adversarial of x and that point projected into the threat. With a threat
as wide as the box, ``distances(x_adv, x, norm)`` are the distances to the nearest adversarial examples.

All of them except DeepFool run every sample to the end, because a nearer point may follow a fooled one. No sample
leaves the batch, so the host never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin, targeted
from ..outputs import Outputs, as_outputs, logits_of
from ..threat import Threat, column
from ..user_input import typed
from .base import Model, MostAdversarial, all_rows, fooled, gradient, predict

INITIAL_TEMPERATURE = 0.2  # of the soft maximum over the wrong classes in cw and fmn, relative to the margin at x


@typed
def distances(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """||x_adv - x|| of each sample: (N, ...), (N, ...) -> (N,).

    >>> distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), "l2")
    tensor([5.])
    """
    return Threat(norm, 1.0).size(x_adv - x)


class NearestAdversarial:
    """The nearest adversarial example seen for each sample.

    Attributes:
        x: (N, ...), the nearest fooled point; the clean image until there is one.
        size: (N,), the norm of its perturbation; infinite until there is one.
    """

    def __init__(self, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.base, self.y, self.threat = x, y, threat
        self.x = x.clone()
        self.size = torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)

    def update(self, x_adv: Tensor, logits: Tensor, accept: Tensor | None = None) -> Tensor:
        """Take in a point for every sample.

        Args:
            x_adv: (N, ...), the points.
            logits: (N, K), the model's logits there.
            accept: (N,) bool, a further condition on the points that count, such as C&W's confidence.

        Returns:
            (N,) bool, which of these points fool the model and are accepted.
        """
        x_adv = x_adv.detach()
        size = self.threat.size(x_adv - self.base)
        success = fooled(logits.detach(), self.y)
        success = success if accept is None else success & accept
        nearer = success & (size < self.size)  # NaN compares as False
        self.x = torch.where(column(nearer, x_adv), x_adv, self.x)
        self.size = torch.where(nearer, size, self.size)
        return success

    def in_threat(self, model: Model, last: Tensor) -> Tensor:
        """The attack's result: the nearest adversarial example of each sample, where it lies in the threat.

        Args:
            model: images to logits or Outputs.
            last: (N, ...), the attack's last points, for samples that no point has fooled.

        Returns:
            (N, ...). Where the nearest adversarial example lies outside the threat, or there is none, it is the more
            adversarial of x and that point (or ``last``) projected into the threat.
        """
        found = self.size.isfinite()
        point = torch.where(column(found, self.x), self.x, last)
        inside = self.threat.project(point, self.base)
        best, rows = MostAdversarial(self.base, self.y), all_rows(self.y)
        for candidate in (self.base, inside):
            best.update(rows, candidate, predict(model, candidate).logits)
        unchanged = found & (inside == point).flatten(1).all(1)
        return torch.where(column(unchanged, point), point, best.x)


def scores_and_grads(
    model: Model, x_adv: Tensor, scores_fn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``score_and_grad`` for several scores of the same logits, by one forward pass and J backward passes.

    Args:
        model: images to logits or Outputs.
        x_adv: (N, ...).
        scores_fn: (N, K) logits -> (N, J) scores.

    Returns:
        (logits (N, K), scores (N, J), their gradients (N, J, ...)).
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = as_outputs(model(x_adv)).logits
    values = scores_fn(logits)
    if not values.requires_grad:  # the model cut the graph
        flat = x_adv.new_zeros(len(values), values.shape[1], *x_adv.shape[1:])
        return logits, values.to(x_adv.dtype), flat
    grads = [gradient(value, x_adv, retain_graph=True) for value in values.unbind(1)]
    return logits.detach(), values.detach().to(x_adv.dtype), torch.stack(grads, 1)


class Adam:
    """Adam's update direction (Kingma and Ba 2015). It acts on each pixel alone, so samples stay independent."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, grad: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.999 * self.square + 0.001 * grad.square()
        return (self.mean / (1 - 0.9**self.count)) / ((self.square / (1 - 0.999**self.count)).sqrt() + 1e-12)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample: (N, ...), (N, ...) -> (N,)."""
    return (a * b).flatten(1).sum(1)


def distance_to_boundary(value: Tensor, grad: Tensor, threat: Threat) -> Tensor:
    """The distance to the boundary of the linearised score, |value| / ||gradient||_dual, at most 1e6: (N,)."""
    dual = threat.dual_size(grad)
    return (value.abs() / dual.clamp_min(torch.finfo(grad.dtype).tiny)).to(grad.dtype).clamp(1e-12, 1e6)


def target_classes(model: Model, x: Tensor, y: Tensor, count: int, target: Tensor | None, name: str) -> Tensor:
    """The classes to attack, (N, J): ``target`` alone, or the ``count`` likeliest wrong classes, as many as there are.

    ``name`` is the attack's argument that holds the count, for the error.
    """
    if target is not None:
        return target[:, None]
    if count < 1:
        raise UserError(f"{name} must be >= 1 (number of target classes), got {count}.")
    logits = predict(model, x).logits
    return logits.scatter(1, y[:, None], -math.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices


def logit_differences_to(y: Tensor, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """The function (N, K) logits -> (N, J) differences z_j - z_y for these classes, (N, J)."""
    return lambda logits: logits.gather(1, classes) - logits.gather(1, y[:, None])


def soft_margin(temperature: Tensor, target: Tensor | None) -> Loss:
    """The negative margin with a soft maximum: T logsumexp_{j != y}(z_j / T) - z_y; the negative margin at T = 0.

    The likeliest wrong class at x need not be the nearest one. At a positive temperature all wrong classes contribute
    to the gradient, so the attack does not settle at the first boundary that it meets. With a target class the score is
    the targeted negative margin at any temperature.

    Args:
        temperature: (N,), T >= 0.
        target: (N,) target classes, or None.
    """
    if target is not None:
        return targeted(negative_margin)

    def score(out: Outputs | Tensor, y: Tensor) -> Tensor:
        logits = logits_of(out)
        wrong = logits.scatter(1, y[:, None], -math.inf)
        largest, t = wrong.detach().amax(1, keepdim=True), temperature.clamp_min(1e-30)[:, None]
        soft_maximum = largest + t * ((wrong - largest) / t).logsumexp(1, keepdim=True)
        return (soft_maximum - logits.gather(1, y[:, None]))[:, 0]

    return score


def cosine(first: float, last: float, fraction: float) -> float:
    """A cosine schedule from ``first`` to ``last``, at this fraction of the run."""
    return last + (first - last) * (1 + math.cos(math.pi * fraction)) / 2
