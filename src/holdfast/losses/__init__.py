"""Per-sample losses and the score that attacks each of them. A loss is a pure function (out, target) -> (N,).

To add one: write the function, and give it a line in ``LOSSES`` with its score and its head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import UserError
from .embedding import center, contrastive, lgm, mmc, triplet
from .scores import dlr, negative_margin, targeted_dlr, towards
from .softmax import arcface, cosface, gap, isce, isce_b, sce, softplus, steady_gap

__all__ = [
    "LOSSES", "Entry", "Loss", "arcface", "center", "contrastive", "cosface", "dlr", "gap", "isce", "isce_b", "lgm",
    "mmc", "negative_margin", "sce", "score_of", "softplus", "steady_gap", "targeted_dlr", "towards", "triplet",
]  # fmt: skip

Loss = Callable[..., Tensor]  # (out, target, **settings) -> (N,); target: y, or any tuple of tensors with leading N


@dataclass(frozen=True)
class Entry:
    """One line of LOSSES: the loss, what an attack climbs, the head that owns its tensors, a word on it."""

    loss: Loss
    score: Loss
    head: str
    about: str
    coupled: bool = False  # a sample's loss depends on its batch mates


LOSSES: dict[str, Entry] = {
    "sce": Entry(sce, gap, "linear", "softmax cross-entropy, label smoothing optional"),
    "isce": Entry(isce, gap, "linear", "inference-softmax cross-entropy, reading A: softplus(u + s)"),
    "isce_b": Entry(isce_b, gap, "linear", "inference-softmax cross-entropy, reading B: extra mass e^tau"),
    "contrastive": Entry(contrastive, gap, "linear", "SCE + pair loss (Sun 2014)", coupled=True),
    "triplet": Entry(triplet, gap, "linear", "SCE + semi-hard triplet loss (Schroff 2015)", coupled=True),
    "center": Entry(center, gap, "center", "SCE + distance to a learned center (Wen 2016)"),
    "lgm": Entry(lgm, negative_margin, "gaussian", "large-margin Gaussian mixture (Wan 2018)"),
    "mmc": Entry(mmc, negative_margin, "mmc", "max-Mahalanobis centers (Pang 2020)"),
    "cosface": Entry(cosface, gap, "cosine", "I-SCE with s = scale m on cosines (Wang 2018)"),
    "arcface": Entry(arcface, gap, "cosine", "additive angular margin (Deng 2019)"),
    "dlr": Entry(dlr, negative_margin, "linear", "difference of logits ratio (Croce 2020)"),
    "negative_margin": Entry(negative_margin, negative_margin, "linear", "max_{j != y} z_j - z_y"),
}


def score_of(loss: Loss | str) -> Loss:
    """The score that an attack on a network trained with this loss climbs: the loss without its monotone link.

    Args: loss: a loss of LOSSES, a ``functools.partial`` of one (settings such as s do not change the score), its name.
    Raises UserError for a function that LOSSES does not know: name its score yourself where one is asked for.

    >>> score_of(partial(isce, s=100.0)) is gap
    True
    """
    function: Any = loss
    while isinstance(function, partial):
        function = function.func
    for name, entry in LOSSES.items():
        if function is entry.loss or function == name:
            return entry.score
    name = getattr(function, "__name__", repr(function))
    raise UserError(
        f"no score is known for the loss '{name}'. Give one: a function (out, y) -> (N,) that is higher nearer to a "
        "mistake, such as holdfast.losses.negative_margin."
    )
