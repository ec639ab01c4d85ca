"""Whether a network's confidence matches its accuracy: calibration error, Brier score, likelihood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import sce
from ..outputs import check_samples
from ..results import CalibrationBins, Reliability
from ..user_input import typed, whole


@typed
def reliability(logits: Tensor, y: Tensor, *, bins: int = 15) -> Reliability:
    """Expected calibration error, Brier score and negative log-likelihood, in float64.

        ece = sum_b n_b / N |accuracy_b - confidence_b|,   brier = mean sum_k (p_k - [k = y])^2,   nll = mean -log p_y

    Args:
        logits: (N, K), finite, N >= 1.
        y: (N,) labels.
        bins: number of bins of equal width over the confidence max_k p_k. A value on an edge is in the lower bin.

    Returns:
        The Reliability.

    Source: Guo et al. 2017; Brier 1950.

    >>> result = reliability(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    >>> result.ece, result.brier, round(result.nll, 4), result.bins.n[7]
    (0.0, 0.5, 0.6931, 2)
    """
    whole("bins", bins, 1)
    check_samples(logits, y)
    z = logits.double()
    p = z.softmax(1)
    confidences, predictions = p.max(1)
    correct = (predictions == y).double()
    bin_of = ((confidences * bins).ceil().long() - 1).clamp(0, bins - 1)
    n, confidence, accuracy = (
        torch.zeros(bins, dtype=torch.float64, device=z.device).index_add(0, bin_of, values)
        for values in (torch.ones_like(confidences), confidences, correct)
    )
    brier = (p - F.one_hot(y, z.shape[1])).square().sum(1).mean()

    def means(sums: Tensor) -> tuple[float | None, ...]:
        return tuple(float(v) if count else None for v, count in zip(sums / n.clamp_min(1), n, strict=True))

    return Reliability(
        ece=float((accuracy - confidence).abs().sum() / len(y)),
        brier=float(brier),
        nll=float(sce(z, y).mean()),
        bins=CalibrationBins(tuple(map(int, n)), means(confidence), means(accuracy)),
    )
