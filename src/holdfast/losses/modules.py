"""Losses that take the place of ``nn.CrossEntropyLoss`` in any training loop.

    criterion = ISCELoss(s=3.0)      # was: nn.CrossEntropyLoss()
    loss = criterion(model(x), y)

They take what ``nn.CrossEntropyLoss`` takes: class indices or probabilities (mixup), weights of classes, an index to
ignore, label smoothing, three reductions, dense outputs (N, K, d1, ...), every floating type, autocast. With
probabilities p, or smoothing, the loss is a mean over classes: sum_c p_c loss(z, c).

A loss with a head of its own takes features in the place of logits, (N, D), and owns the head: give its parameters to
the optimiser too. ``criterion.head(features).logits`` are the logits of the network.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, type_of, unknown
from ..outputs import Outputs, logits_of
from ..user_input import number, whole
from .embedding import center, contrastive, lgm, mmc, triplet
from .heads import Centers, Cosine, GaussianMixture, Linear, MaxMahalanobis
from .reading_c import isce_c
from .scores import negative_margin
from .softmax import arcface, cosface, isce, isce_b, negative_log_odds, negative_log_odds_of_all, softplus
from .types import Loss

REDUCTIONS = ("mean", "sum", "none")


class LossModule(nn.Module):
    """The interface of ``nn.CrossEntropyLoss`` around a loss (out, y) -> (N,).

    Args:
        loss: (out, y, **settings) -> (N,).
        settings: of the loss.
        score: what attacks on the network should maximise: the loss without its monotone link.
        head: the loss's own last layer, features -> Outputs; None where it takes logits.
        features: D of that head.
        coupled: whether a sample's loss depends on the rest of its batch.
        weight: (K,), a factor on each class's loss; None for ones.
        ignore_index: a class index that counts nothing, neither in the loss nor in its mean.
        reduction: "mean" (divided by the sum of the weights), "sum" or "none".
        label_smoothing: in [0, 1): the share of the target that is spread over all classes.

    Raises:
        UserError: a setting is outside its range.
    """

    weight: Tensor | None

    def __init__(
        self,
        loss: Loss,
        settings: dict[str, Any],
        *,
        score: Loss = negative_log_odds,
        head: nn.Module | None = None,
        features: int = 2,
        coupled: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise unknown("reduction", str(reduction), REDUCTIONS)
        if weight is not None and not (isinstance(weight, Tensor) and weight.ndim == 1):
            raise UserError(f"weight must be a tensor (K,) of one factor for each class, got {type_of(weight)}.")
        whole("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        number("label_smoothing", label_smoothing, 0)
        if label_smoothing >= 1:
            raise UserError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if coupled and label_smoothing:
            raise UserError(f"{type(self).__name__} compares samples of one class: it takes no label smoothing.")
        self.loss, self.score, self.head, self.coupled = loss, score, head, coupled
        self.settings = {key: value for key, value in settings.items() if not isinstance(value, Tensor)}
        self.tensors = [key for key in settings if key not in self.settings]
        for key in self.tensors:
            self.register_buffer(key, settings[key])
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        if not self.tensors:  # settings are checked here, not in the first batch
            with torch.no_grad():
                self.per_sample(self._answer(torch.zeros(1, features)), torch.zeros(1, dtype=torch.int64))

    def per_sample(self, out: Outputs | Tensor, y: Tensor) -> Tensor:
        """The loss itself: out and class indices (M,) -> (M,)."""
        return self.loss(out, y, **self.settings, **{key: getattr(self, key) for key in self.tensors})

    def per_class(self, out: Outputs | Tensor) -> Tensor:
        """The loss that a sample would have with each class for its own: (M, K)."""
        count, classes = logits_of(out).shape
        every = torch.arange(classes, device=logits_of(out).device)
        return torch.stack([self.per_sample(out, c.expand(count)) for c in every], 1)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # the names that nn.CrossEntropyLoss has
        """The loss.

        Args:
            input: logits, or features of a loss that has a head: (K,), (N, K) or (N, K, d1, ...).
            target: class indices, (), (N,) or (N, d1, ...); or probabilities (K,), (N, K) or (N, K, d1, ...).

        Returns:
            A number; with reduction "none" one for each index.

        Raises:
            UserError: shapes that do not belong together.
        """
        rows, target, shape = _as_rows(input, target)
        losses, weights = (self._of_mixtures if target.is_floating_point() else self._of_indices)(rows, target)
        if not torch.is_autocast_enabled(input.device.type):
            losses = losses.to(input.dtype)
        if self.reduction == "none":
            return losses.view(shape)
        return losses.sum() if self.reduction == "sum" else losses.sum() / weights.sum().to(losses.dtype)

    def extra_repr(self) -> str:
        own = self.settings | {key: f"tensor {tuple(getattr(self, key).shape)}" for key in self.tensors}
        return ", ".join(f"{key}={value}" for key, value in (own | {"reduction": self.reduction}).items())

    def _answer(self, rows: Tensor) -> Outputs | Tensor:
        """What the loss reads: logits as they are, or the head's answer to features."""
        return rows if self.head is None else self.head(rows)

    def _of_indices(self, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and weights, (M,): both are 0 where the class is ignored."""
        counted = y != self.ignore_index
        y = y.masked_fill(~counted, 0)
        weights = counted.to(torch.float32) if self.weight is None else self.weight[y] * counted
        if self.coupled:  # an ignored sample is in no pair
            losses = torch.zeros_like(weights)
            losses[counted] = self.per_sample(self._answer(rows[counted]), y[counted]).to(losses.dtype)
            return losses * weights, weights
        out = self._answer(rows.masked_fill(~counted[:, None], 0.0))  # whatever stands there, NaN too
        losses = self.per_sample(out, y) * weights
        if self.label_smoothing:
            spread = self._weighted(self.per_class(out)).mean(1) * counted
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * spread
        return losses, weights

    def _of_mixtures(self, rows: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of probabilities, and weights of 1."""
        if self.coupled:
            raise UserError(f"{type(self).__name__} compares samples of one class: it needs class indices.")
        if self.ignore_index >= 0:
            raise UserError("ignore_index is a class index, and the target holds probabilities: leave it out.")
        by_class = self._weighted(self.per_class(self._answer(rows)))
        if by_class.shape != p.shape:
            raise UserError(f"the target has probabilities of {p.shape[1]} classes, the network {by_class.shape[1]}.")
        if self.label_smoothing:
            p = (1 - self.label_smoothing) * p + self.label_smoothing / p.shape[1]
        return (by_class * p).sum(1), torch.ones(len(p), device=p.device)

    def _weighted(self, by_class: Tensor) -> Tensor:
        return by_class if self.weight is None else by_class * self.weight


def _as_rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(M, K) rows, a target for each, and the shape of the losses."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        raise UserError(f"a loss takes tensors of logits and of targets, got {type_of(input)} and {type_of(target)}.")
    axis = min(1, input.ndim - 1)  # of the classes
    soft = target.is_floating_point()
    places = (*input.shape[:axis], *input.shape[axis + 1 :])
    found = (*target.shape[:axis], *target.shape[axis + 1 :]) if soft else tuple(target.shape)
    if not input.ndim or not input.is_floating_point() or found != places:
        kind = "probabilities" if soft else "class indices"
        raise UserError(
            f"{input.dtype} logits of shape {tuple(input.shape)} and {kind} of shape {tuple(target.shape)} do not "
            "belong together: expected (N, K, ...) logits, and (N, ...) indices or (N, K, ...) probabilities."
        )
    if input.shape[axis] < 2:
        raise UserError(f"a loss of classes needs at least 2 classes, got {input.shape[axis]}.")
    rows = input.movedim(axis, -1).reshape(-1, input.shape[axis])
    return rows, target.movedim(axis, -1).reshape(-1, target.shape[axis]) if soft else target.reshape(-1), places


class ISCELoss(LossModule):
    """I-SCE, reading A: softplus(u + s). At s = 0 it equals ``nn.CrossEntropyLoss`` in all that that one takes.

    Args:
        s: inference information, >= 0; or a tensor broadcastable to (N, K), see ``losses.isce``.
        gamma: exponent of the focal factor, >= 0.
        temperature: > 0.
        **common: weight, ignore_index, reduction, label_smoothing.

    >>> z, y = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
    >>> ISCELoss(s=0.0)(z, y), nn.CrossEntropyLoss()(z, y)
    (tensor(0.4170), tensor(0.4170))
    >>> ISCELoss(s=5.0)(z, torch.tensor([[0.7, 0.3, 0.0]]))      # probabilities, as mixup gives them
    tensor(4.8903)
    """

    def __init__(self, s: float | Tensor = 1.0, *, gamma: float = 0.0, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(isce, {"s": s, "gamma": gamma, "temperature": temperature}, **common)

    def per_class(self, out: Outputs | Tensor) -> Tensor:
        if self.tensors or self.settings["gamma"] or self.settings["temperature"] != 1:
            return super().per_class(out)
        return softplus(negative_log_odds_of_all(out) + self.settings["s"])


class ISCEBLoss(LossModule):
    """I-SCE, reading B: an additional class with the constant logit tau. Arguments: tau, and those of ISCELoss.

    >>> ISCEBLoss(tau=2.0)(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor(0.9232)
    """

    def __init__(self, tau: float = 0.0, **common: Any) -> None:
        super().__init__(isce_b, {"tau": tau}, **common)

    def per_class(self, out: Outputs | Tensor) -> Tensor:
        if self.settings["tau"] == -math.inf:
            return softplus(negative_log_odds_of_all(out))
        return softplus(torch.logaddexp(negative_log_odds_of_all(out), self.settings["tau"] - logits_of(out)))


class ISCECLoss(LossModule):
    """I-SCE, reading C, a public program's. Arguments: m, s, clip, mask (``losses.isce_c``), and those of ISCELoss.

    >>> ISCECLoss()(torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([0]))
    tensor(0.5759)
    """

    def __init__(
        self, m: float = 0.1, *, s: float = 1.0, clip: bool = True, mask: str = "predicted", **common: Any
    ) -> None:
        settings = {"m": m, "s": s, "clip": clip, "mask": mask}
        super().__init__(isce_c, settings, score=negative_margin, **common)


class CosFaceLoss(LossModule):
    """CosFace on a cosine head of its own. Arguments: features D, classes K, m, scale, and those of ISCELoss.

    >>> _ = torch.manual_seed(0)
    >>> criterion = CosFaceLoss(features=8, classes=3, scale=15.0, m=0.2)
    >>> h, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    >>> criterion(h, y) > nn.functional.cross_entropy(criterion.head(h).logits, y)      # by the margin
    tensor(True)
    """

    def __init__(self, features: int, classes: int, *, m: float = 0.35, scale: float = 64.0, **common: Any) -> None:
        head = Cosine(features, classes, scale)
        super().__init__(cosface, {"m": m, "scale": scale}, head=head, features=features, **common)


class ArcFaceLoss(LossModule):
    """ArcFace on a cosine head of its own. Arguments: features D, classes K, m, scale, and those of ISCELoss.

    >>> ArcFaceLoss(features=8, classes=3)(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
    torch.Size([])
    """

    def __init__(self, features: int, classes: int, *, m: float = 0.5, scale: float = 64.0, **common: Any) -> None:
        head = Cosine(features, classes, scale)
        super().__init__(arcface, {"m": m, "scale": scale}, head=head, features=features, **common)


class CenterLoss(LossModule):
    """Center loss. Arguments: features D, classes K, center_weight of the center term, and those of ISCELoss.

    >>> criterion, h = CenterLoss(features=8, classes=3, center_weight=0.0), torch.randn(2, 8)
    >>> y = torch.tensor([0, 1])
    >>> bool(torch.allclose(criterion(h, y), nn.functional.cross_entropy(criterion.head(h).logits, y)))
    True
    """

    def __init__(self, features: int, classes: int, *, center_weight: float = 0.05, **common: Any) -> None:
        head = Centers(features, classes)
        super().__init__(center, {"weight": center_weight}, head=head, features=features, **common)


class LGMLoss(LossModule):
    """Large-margin Gaussian mixture, on a Gaussian head.

    Arguments: features D, classes K, ratio, likelihood_weight, variances, and those of ISCELoss. See
    ``losses.lgm`` and the head ``GaussianMixture``.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        ratio: float = 0.1,
        likelihood_weight: float = 0.01,
        variances: bool = False,
        **common: Any,
    ) -> None:
        head = GaussianMixture(features, classes, variances)
        settings = {"ratio": ratio, "weight": likelihood_weight}
        super().__init__(lgm, settings, score=negative_margin, head=head, features=features, **common)


class MMCLoss(LossModule):
    """Max-Mahalanobis center loss. Arguments: features D, classes K, radius, and those of ISCELoss.

    >>> criterion = MMCLoss(features=8, classes=3)
    >>> sorted(name for name, _ in criterion.named_buffers())      # the centers are fixed, and saved with the loss
    ['head.centers']
    """

    def __init__(self, features: int, classes: int, *, radius: float = 10.0, **common: Any) -> None:
        head = MaxMahalanobis(features, classes, radius)
        super().__init__(mmc, {}, score=negative_margin, head=head, features=features, **common)


class ContrastiveLoss(LossModule):
    """SCE and the contrastive pair loss, on a linear head.

    Arguments: features D, classes K, pair_weight, separation, and those of ISCELoss but label_smoothing.
    It needs class indices. An ignored sample is in no pair.
    """

    def __init__(
        self, features: int, classes: int, *, pair_weight: float = 0.05, separation: float = 1.0, **common: Any
    ) -> None:
        settings = {"weight": pair_weight, "separation": separation}
        super().__init__(
            contrastive, settings, head=Linear(features, classes), features=features, coupled=True, **common
        )


class TripletLoss(LossModule):
    """SCE and the semi-hard triplet loss, on a linear head.

    Arguments: features D, classes K, triplet_weight, separation, and those of ISCELoss but label_smoothing.
    It needs class indices. An ignored sample is in no triplet.
    """

    def __init__(
        self, features: int, classes: int, *, triplet_weight: float = 1.0, separation: float = 0.2, **common: Any
    ) -> None:
        settings = {"weight": triplet_weight, "separation": separation}
        super().__init__(triplet, settings, head=Linear(features, classes), features=features, coupled=True, **common)
