"""Several networks as one: the average of their probabilities or logits, through which gradients flow to all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, type_of, unknown
from ..outputs import Model, as_outputs
from ..user_input import typed

MEANS = ("probabilities", "logits")


class Ensemble(nn.Module):
    """The average of several networks; ``ensemble`` makes it.

    Args:
        members: images in [0, 1] to (N, K) logits. Modules become children; a function's own modules do not.
        mean: "probabilities" or "logits".
    """

    def __init__(self, members: Sequence[Model], mean: str) -> None:
        super().__init__()
        self.members, self.mean = list(members), mean
        self.networks = nn.ModuleList([one for one in members if isinstance(one, nn.Module)])
        self.training = any(network.training for network in self.networks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, K) logits, whose softmax is the average where probabilities are averaged."""
        answers = [as_outputs(member(x)).logits for member in self.members]
        if len({answer.shape for answer in answers}) > 1:
            shapes = ", ".join(str(tuple(answer.shape)) for answer in answers)
            raise UserError(f"the networks of an ensemble must have the same classes, their logits are {shapes}.")
        if self.mean == "logits":
            return torch.stack(answers).mean(0)
        averaged = torch.stack([F.log_softmax(answer, 1) for answer in answers]).logsumexp(0) - math.log(len(answers))
        # A constant for each image, so that equal members give back their own logits: log-probabilities of a confident
        # answer have a vanishing gradient, which a trust check takes for a masked one.
        return averaged + torch.stack(answers).logsumexp(2).mean(0)[:, None]


@typed
def ensemble(members: Sequence[Any], mean: str = "probabilities") -> Ensemble:
    """One network from several, or from one under several transforms of its input.

    With "probabilities", class k has the logit log((p_1k + ... + p_Mk) / M) + c. Here p_m is the softmax of
    network m's logits, and c the mean of their logsumexps, which changes no softmax and no margin.
    Log-softmaxes are summed, so that nothing underflows. Attacks climb the margin of the average. With "logits", the
    logits are averaged.

    A transform at test time is a member of its own: a module that changes the images and then asks a network.

    Args:
        members: two or more networks, or functions of images, with the same K classes in the same order.
        mean: what is averaged: "probabilities" or "logits".

    Returns:
        A module from (N, C, H, W) images in [0, 1] to (N, K) logits. It shares the members' weights and mode,
        train or eval.

    Raises:
        UserError: fewer than two members, one that cannot be called, or another mean.

    >>> one, two = (lambda x: torch.tensor([[0.0, 0.0]])), (lambda x: torch.tensor([[0.0, 200.0]]))
    >>> ensemble([one, two])(torch.zeros(1, 1, 2, 2)).softmax(1)
    tensor([[0.2500, 0.7500]])
    """
    if mean not in MEANS:
        raise unknown("mean of an ensemble", mean, MEANS)
    if len(members) < 2:
        raise UserError(f"an ensemble needs at least 2 networks, got {len(members)}.")
    for member in members:
        if not callable(member) or isinstance(member, type):
            raise UserError(
                f"a member of an ensemble must be a torch module or a function of images, got {type_of(member)}."
            )
    return Ensemble(members, mean)
