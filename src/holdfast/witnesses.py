"""Adversarial examples that are found outside the suite: by an audit or by the minimal-norm attack of the region."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Witnesses"]


class Witnesses(NamedTuple):
    """Adversarial examples of samples that no earlier attack broke.

    Attributes:
        rows: (M,) int64, which samples of the evaluation they belong to.
        x_adv: (M, C, H, W), points of the threat that are misclassified.
        margin: (M,), logit_y - largest other logit there; not positive.
        prediction: (M,) int64, predicted class there.
    """

    rows: Tensor
    x_adv: Tensor
    margin: Tensor
    prediction: Tensor
