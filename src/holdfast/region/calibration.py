"""Whether a network is as sure as it is right: calibration error, Brier score, likelihood."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import sce


def reliability(logits: Tensor, y: Tensor, *, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error, Brier score and negative log-likelihood, in float64.

        ece = sum_b n_b / N |accuracy_b - confidence_b|,   brier = mean sum_k (p_k - [k = y])^2,   nll = mean -log p_y

    Args: logits: (N, K), finite, N >= 1; y: (N,); bins: of equal width over the confidence, max_k p_k, a value on the
    border in the lower one.
    Returns ece, brier, nll and bins: n, confidence and accuracy of each, None where it is empty.
    Source: Guo et al. 2017; Brier 1950.

    >>> told = reliability(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    >>> told["ece"], told["brier"], round(told["nll"], 4), told["bins"]["n"][7]
    (0.0, 0.5, 0.6931, 2)
    """
    z = logits.double()
    p = z.softmax(1)
    sure, said = p.max(1)
    right = (said == y).double()
    place = ((sure * bins).ceil().long() - 1).clamp(0, bins - 1)
    n, confidence, accuracy = (
        torch.zeros(bins, dtype=torch.float64, device=z.device).index_add(0, place, v)
        for v in (torch.ones_like(sure), sure, right)
    )
    many = n.clamp_min(1)
    brier = (p - F.one_hot(y, z.shape[1])).square().sum(1).mean()

    def known(sums: Tensor) -> list[float | None]:
        return [float(v) if c else None for v, c in zip(sums / many, n, strict=True)]

    return {
        "ece": float((accuracy - confidence).abs().sum() / len(y)),
        "brier": float(brier),
        "nll": float(sce(z, y).mean()),
        "bins": {
            "n": [int(c) for c in n],
            "confidence": known(confidence),
            "accuracy": known(accuracy),
        },
    }
