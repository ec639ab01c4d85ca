"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019): certificates for l2, of any network that can be evaluated.

    g(x) = the class that the network predicts most often at x + sigma e,  e standard normal

g is the smoothed classifier. Where its class has a probability of at least p > 1/2 at x, its answer is the same at all
x_adv with ||x_adv - x||_2 < sigma Phi^-1(p). p is bounded from counted votes, so the certificate holds with probability
1 - alpha over the noise, for each sample; and it is one of the smoothed classifier, never of the network itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.arguments import AnyData, as_data
from ..noise import Noise
from ..outputs import Model, frozen_eval
from ..progress import Progress, as_progress
from ..queries import Batches, exact_float32
from ..results import Interval, proportion
from ..threat import Threat
from ..user_input import any_seed, number, of_type, typed
from .votes import (
    Cost,
    Probe,
    Vote,
    Work,
    batch_size_of,
    count_votes,
    outvoted,
    p_lower_bound,
    radius_of,
    samples_of,
    settings_of,
)

ABSTAIN = -1  # in place of a class, where no class has more than half of the probability for sure


@dataclass(frozen=True)
class Smoothed:
    """What is certified of the smoothed classifier, sample by sample; not of the network.

    Columns have the shape (N,) and are on the CPU. Each sample's class and radius hold with probability 1 - alpha.

    Args:
        vote: How the smoothed classifier was asked.
        index: int64, the samples' places in the data set.
        y: int64, the labels.
        selected: int64, the class that the n0 votes selected.
        votes: int64, how many of the n votes are for it.
        votes_y: int64, how many are for y.
        p_low: float64, the exact lower bound of its probability.
        radius: float64, the certified l2 radius, in units of the pixels; 0 where the classifier abstains.
        dim: Number of values of a sample.
        cost: Forward passes and seconds, over all processes that worked on it.
    """

    vote: Vote
    index: Tensor
    y: Tensor
    selected: Tensor
    votes: Tensor
    votes_y: Tensor
    p_low: Tensor
    radius: Tensor
    dim: int
    cost: Cost

    def __len__(self) -> int:
        return len(self.y)

    @property
    def abstains(self) -> Tensor:
        """(N,) bool: no class has a probability above one half for sure."""
        return self.p_low <= 0.5

    @property
    def prediction(self) -> Tensor:
        """(N,) int64: the smoothed classifier's class, ABSTAIN (-1) where it abstains."""
        return self.selected.masked_fill(self.abstains, ABSTAIN)

    @property
    def wrong(self) -> Tensor:
        """(N,) bool: the smoothed classifier's class at x is another than y, with probability 1 - alpha."""
        return (self.selected != self.y) & outvoted(self.votes, self.votes_y, self.vote.alpha)

    @typed
    def certified(self, radius: float) -> Tensor:
        """Which samples the smoothed classifier is certified to answer with y at every point this near.

        Args:
            radius: In l2, >= 0. All that ``Threat.violation`` forgives lies within the proof too.

        Returns:
            (N,) bool; an abstention is not certified.

        Raises:
            UserError: A negative radius.
        """
        number("radius", radius, 0)
        farthest = Threat("l2", radius).farthest(self.dim) if radius else 0.0
        return (self.prediction == self.y) & (self.radius > farthest)

    @typed
    def certified_accuracy(self, radius: float) -> Interval:
        """The share of samples that are certified at a radius, with its 95% interval over samples.

        Args:
            radius: In l2, >= 0.

        Returns:
            The share and its Clopper-Pearson interval: what other samples of the same kind would give. That a
            certificate fails with probability alpha comes on top.
        """
        return proportion(int(self.certified(radius).sum()), len(self))


@typed
def certify_smoothed(
    model: Model,
    data: AnyData,
    sigma: float,
    *,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Smoothed:
    """Certify the smoothed classifier of a network under l2, sample by sample (Cohen et al. 2019, CERTIFY).

    n0 noisy votes select a class, n fresh ones give the exact lower bound p of its probability, and the radius is
    sigma Phi^-1(p); where p <= 1/2 the smoothed classifier abstains. What is certified is the smoothed classifier and
    not the network; and each sample's certificate holds with probability 1 - alpha.

    The noise is not clipped to the box of pixels: the theorem is about normal noise. It is a hash of (seed, sample,
    vote), so neither the batch size nor an interruption changes it. The theorem is about real numbers; images and noise
    are float32, which a function that is built to exploit its rounding may abuse (Voracek and Hein 2023).

    Args:
        model: Images to logits or Outputs. A noisy image with a logit that is not finite votes for no class.
        data: The samples, uint8 or float in [0, 1]: Data, (x, y), a DataLoader, a data set or its name.
        sigma: Standard deviation of the noise, in units of pixels in [0, 1].
        n: Votes per sample that bound the probability.
        n0: Votes per sample that select the class.
        alpha: Probability that a sample's certificate is wrong.
        seed: Of the noise. A seed that is chosen by its result voids the probability.
        batch_size: Noisy images per query; default by image size and device, halved where memory runs out.
        checkpoint: File that votes are saved to as they come, and resumed from.
        key: What the checkpoint belongs to: network and data.
        progress: Called with ("votes", votes so far, votes in all).

    Returns:
        Smoothed.

    Raises:
        UserError: An empty set; pixels outside [0, 1]; labels without a logit; a value out of its range; a network that
            answers the same noisy image otherwise in another batch or later, since the votes are then not those of one
            classifier; a checkpoint of another certificate.

    Source: Cohen, Rosenfeld and Kolter 2019.

    >>> net = lambda x: torch.cat([x.flatten(1) - 0.5, 0.5 - x.flatten(1)], 1)       # class 0 above 0.5
    >>> from holdfast.data import Data
    >>> data = Data(torch.tensor([1.0, 0.5]).view(2, 1, 1, 1), torch.tensor([0, 0]), torch.arange(2), ("0", "1"), "it")
    >>> found = certify_smoothed(net, data, 0.125, n=1000)                           # the first is 4 sigma away
    >>> found.prediction.tolist(), found.votes[0].item(), [round(float(r), 3) for r in found.radius]
    ([0, -1], 1000, [0.308, 0.0])
    """
    vote, data, report = Vote(sigma, n, n0, alpha), as_data(data), as_progress(progress)
    of_type("key", key, str)
    data, batches = samples_of(model, data), Batches(batch_size_of(data, batch_size))
    noise = Noise(any_seed(seed), data.index)
    with exact_float32(), frozen_eval(model), torch.no_grad():
        probe = Probe(model, data, vote, noise, batches)
        work = Work(checkpoint, {"key": key, "what": "clean", **settings_of(vote, data, seed)}, probe)
        work.open_votes(len(data), probe.classes, data.y.device)
        counted = count_votes(work, data, noise, vote, batches, report)
        cost = work.finish()
        probe.repeat()
    selected, votes, votes_y = (column.cpu() for column in counted)
    p_low = p_lower_bound(votes, n, alpha)
    return Smoothed(
        vote, data.index.cpu(), data.y.cpu(), selected, votes, votes_y, p_low, radius_of(p_low, sigma),
        math.prod(data.x.shape[1:]), cost,
    )  # fmt: skip
