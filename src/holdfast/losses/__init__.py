"""Per-sample losses and the score that attacks each of them. A loss is a pure function (out, target) -> (N,).

To add one: write the function, and give it a line in ``LOSSES`` with its score and its head. ``modules`` holds the same
losses as drop-ins for ``nn.CrossEntropyLoss``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import UserError, type_of, unknown
from ..spec import accepts, parse
from .embedding import center, contrastive, lgm, mmc, triplet
from .entry import LossEntry
from .modules import (
    ArcFaceLoss,
    CenterLoss,
    ContrastiveLoss,
    CosFaceLoss,
    ISCEBLoss,
    ISCECLoss,
    ISCELoss,
    LGMLoss,
    LossModule,
    MMCLoss,
    TripletLoss,
)
from .own import OwnLoss, load_own_loss
from .reading_c import isce_c, reading_c_logits
from .scores import dlr, is_targeted, negative_margin, targeted, targeted_dlr
from .softmax import (
    arcface,
    cosface,
    isce,
    isce_b,
    negative_log_odds,
    negative_log_odds_of_all,
    scaled_log_odds,
    sce,
    softplus,
)
from .types import Loss

__all__ = [
    "LOSSES",
    "ArcFaceLoss",
    "CenterLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "ISCEBLoss",
    "ISCECLoss",
    "ISCELoss",
    "LGMLoss",
    "Loss",
    "LossEntry",
    "LossModule",
    "MMCLoss",
    "OwnLoss",
    "TripletLoss",
    "arcface",
    "as_loss",
    "center",
    "contrastive",
    "cosface",
    "dlr",
    "is_targeted",
    "isce",
    "isce_b",
    "isce_c",
    "lgm",
    "load_own_loss",
    "loss_name",
    "mmc",
    "negative_log_odds",
    "negative_log_odds_of_all",
    "negative_margin",
    "reading_c_logits",
    "required_loss",
    "scaled_log_odds",
    "sce",
    "score_of",
    "softplus",
    "targeted",
    "targeted_dlr",
    "triplet",
]  # fmt: skip


LOSSES: dict[str, LossEntry] = {
    "sce": LossEntry(sce, negative_log_odds, "linear", "softmax cross-entropy, label smoothing optional"),
    "isce": LossEntry(isce, negative_log_odds, "linear", "inference-softmax cross-entropy, reading A: softplus(u + s)"),
    "isce_b": LossEntry(
        isce_b, negative_log_odds, "linear", "inference-softmax cross-entropy, reading B: extra mass e^tau"
    ),
    "isce_c": LossEntry(
        isce_c, negative_margin, "linear", "reading C, a public program's: unit-norm logits, m on the predicted class"
    ),
    "contrastive": LossEntry(contrastive, negative_log_odds, "linear", "SCE + pair loss (Sun 2014)", coupled=True),
    "triplet": LossEntry(
        triplet, negative_log_odds, "linear", "SCE + semi-hard triplet loss (Schroff 2015)", coupled=True
    ),
    "center": LossEntry(center, negative_log_odds, "center", "SCE + distance to a learned center (Wen 2016)"),
    "lgm": LossEntry(lgm, negative_margin, "gaussian", "large-margin Gaussian mixture (Wan 2018)"),
    "mmc": LossEntry(mmc, negative_margin, "mmc", "max-Mahalanobis centers (Pang 2020)"),
    "cosface": LossEntry(cosface, negative_log_odds, "cosine", "I-SCE with s = scale m on cosines (Wang 2018)"),
    "arcface": LossEntry(arcface, negative_log_odds, "cosine", "additive angular margin (Deng 2019)"),
    "dlr": LossEntry(dlr, negative_margin, "linear", "difference of logits ratio (Croce 2020)"),
    "negative_margin": LossEntry(negative_margin, negative_margin, "linear", "max_{j != y} z_j - z_y"),
}


def loss_name(loss: Loss | None) -> str:
    """A loss in words, for the identity of what was done with it: its function's name, and the settings of a partial.

    >>> loss_name(partial(isce, s=3.0))
    "holdfast.losses.softmax.isce {'s': 3.0}"
    """
    function, settings = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '')}.{name} {settings}"


def as_loss(loss: Loss | str | None) -> Loss | None:
    """The loss that an argument is: a function as it is, a text by its name in LOSSES, with settings after a colon.

    Args:
        loss: what a caller gave; None for none.

    Returns:
        The loss, (out, y) -> (N,), or None.

    Raises:
        UserError: an unknown name or setting, or neither a function nor a text.

    >>> as_loss("sce") is sce, as_loss(sce) is sce, as_loss("isce:s=3").keywords
    (True, True, {'s': 3})
    """
    return None if loss is None else required_loss(loss)


def required_loss(loss: Loss | str) -> Loss:
    """The loss that an argument is, as ``as_loss`` reads it, where there must be one. Raises UserError for None too."""
    if callable(loss) and not isinstance(loss, type):
        return loss
    if not isinstance(loss, str):
        raise UserError(f"a loss must be a function (out, y) -> (N,) or a name such as 'sce', got {type_of(loss)}.")
    name, settings = parse(loss)
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    accepts("loss", name, LOSSES[name].loss, settings)
    return partial(LOSSES[name].loss, **settings) if settings else LOSSES[name].loss


def score_of(loss: Loss | str) -> Loss:
    """The score for attacks on a network that was trained with this loss: the loss without its monotone link.

    Args:
        loss: a loss of LOSSES, a ``functools.partial`` of one (settings such as s do not change the score), or its
            name.

    Returns:
        The score, (out, y) -> (N,).

    Raises:
        UserError: LOSSES does not hold the function. Give its score yourself where one is asked for.

    >>> score_of(partial(isce, s=100.0)) is negative_log_odds
    True
    """
    function: Any = loss
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, OwnLoss):
        return function.score
    for name, entry in LOSSES.items():
        if function is entry.loss or function == name:
            return entry.score
    name = getattr(function, "__name__", repr(function))
    raise UserError(
        f"no score is known for the loss '{name}'. Give one: a function (out, y) -> (N,) that is higher nearer to a "
        "mistake, such as holdfast.losses.negative_margin."
    )
