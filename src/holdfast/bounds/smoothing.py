"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019): certificates for l2, of any network that can be evaluated.

    g(x) = the class that the network predicts most often at x + sigma e,  e standard normal

g is the smoothed classifier. Where its class has a probability of at least p > 1/2 at x, its answer is the same at all
x_adv with ||x_adv - x||_2 < sigma Phi^-1(p). p is bounded from counted votes, so the certificate holds with probability
1 - alpha over the noise, for each sample; and it is one of the smoothed classifier, never of the network itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from scipy import stats
from torch import Tensor

from ..data import Data, pixels
from ..data.arguments import as_data, check_logits, note_assumptions
from ..errors import UserError
from ..io import load_tensors, save_tensors, understood
from ..noise import Noise, SmoothingStream
from ..outputs import Model, frozen_eval
from ..progress import Progress, as_progress
from ..queries import Batches, CountingModel, default_batch_size, device_of, differs_off_data, exact_float32
from ..results import Interval, proportion
from ..threat import Threat
from ..user_input import any_seed, number, of_type, typed, whole

ABSTAIN = -1  # in place of a class, where no class has more than half of the probability for sure
CHECKPOINT, CHECKPOINT_VERSION = "smoothing checkpoint", 1
INTERVAL, SHARE = 5.0, 20  # seconds between two checkpoints, and so many times what writing one takes, at least
LEAST_SIGMA, MOST_SIGMA = 1e-4, 10.0  # of pixels in [0, 1]: float32 must resolve the noise, and the noise the image
MOST_VOTES = 10**9
PROBED = 32  # noisy images that are asked again: alone, among others, and at the end


@dataclass(frozen=True)
class Vote:
    """How a smoothed classifier is asked.

    Args:
        sigma: Standard deviation of the noise, in units of the pixels, 1e-4 to 10.
        n: Votes that bound the probability of the class, >= 1. It is fixed beforehand: to stop once the votes look good
            would void the bound.
        n0: Votes of their own that select the class, >= 1.
        alpha: Probability that a certificate is wrong, of each sample, in (0, 1).

    Raises:
        UserError: A value outside its range.
    """

    sigma: float
    n: int = 10_000
    n0: int = 100
    alpha: float = 0.001

    def __post_init__(self) -> None:
        sigma = number("sigma, the standard deviation of the noise,", self.sigma, 0, above=True)
        if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
            hint = f" Did you mean {sigma:g}/255?" if sigma > MOST_SIGMA and sigma < 255 * MOST_SIGMA else ""
            raise UserError(
                f"sigma must be {LEAST_SIGMA:g} to {MOST_SIGMA:g}, in units of pixels in [0, 1], got {sigma:g}.{hint}"
            )
        object.__setattr__(self, "sigma", float(sigma))
        for name in ("n", "n0"):
            whole(f"{name}, a number of votes,", getattr(self, name), 1, MOST_VOTES)
        if not 0 < number("alpha, the probability that a certificate is wrong,", self.alpha) < 1:
            raise UserError(
                "alpha, the probability that a certificate is wrong, must lie between 0 and 1, such as 0.001, got "
                f"{self.alpha}."
            )

    @property
    def largest_radius(self) -> float:
        """The radius where all votes agree; 0 where even then the smoothed classifier abstains."""
        return float(radius_of(p_lower_bound(torch.tensor([self.n]), self.n, self.alpha), self.sigma))


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


@dataclass(frozen=True)
class Cost:
    """What work took: passes, counted in images, and wall-clock seconds."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@typed
def p_lower_bound(votes: Tensor, n: int, alpha: float) -> Tensor:
    """The exact one-sided lower bound of a probability at confidence 1 - alpha (Clopper and Pearson 1934).

        Beta(k, n - k + 1) at alpha;  alpha^(1/n) for k = n;  0 for k = 0

    Args:
        votes: (N,) int64, k of n.
        n: Number of votes, >= 1.
        alpha: In (0, 1).

    Returns:
        (N,) float64.

    >>> [round(float(p), 4) for p in p_lower_bound(torch.tensor([0, 100]), 100, 0.001)], round(0.001 ** 0.01, 4)
    ([0.0, 0.9333], 0.9333)
    """
    k = votes.cpu().numpy()
    low = stats.beta.ppf(alpha, k.clip(1), n - k.clip(1) + 1)
    return torch.from_numpy(low).double().masked_fill(votes.cpu() == 0, 0.0)


@typed
def radius_of(p_low: Tensor, sigma: float) -> Tensor:
    """sigma Phi^-1(p) where p > 1/2, else 0.

    Args:
        p_low: (N,) float64, lower bounds of the class's probability.
        sigma: Of the noise.

    Returns:
        (N,) float64, less the rounding of the two functions that it comes from.

    >>> [round(float(r), 4) for r in radius_of(torch.tensor([0.5, 0.8413447460685429]), 0.25)]
    [0.0, 0.25]
    """
    quantile = torch.from_numpy(stats.norm.ppf(p_low.numpy())).double()
    return (sigma * quantile * (1 - 1e-9)).masked_fill(p_low <= 0.5, 0.0)


@typed
def certify_smoothed(
    model: Model,
    data: Data,
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
        data: Samples in [0, 1], uint8 or float.
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
        probe = Probe(model, data, vote, noise)
        work = Work(checkpoint, {"key": key, "what": "clean", **settings_of(vote, data, seed)}, probe.model)
        work.open({"counts": (len(data), probe.classes), "votes": (len(data),)}, data.x.device)
        selected = count_votes(work, data.x, noise, vote, batches, report)
        cost = work.finish()
        probe.repeat()
    votes = work.tensors["votes"].cpu().long()
    p_low = p_lower_bound(votes, n, alpha)
    return Smoothed(
        vote, data.index.cpu(), data.y.cpu(), selected.cpu(), votes, p_low, radius_of(p_low, sigma),
        math.prod(data.x.shape[1:]), cost,
    )  # fmt: skip


def samples_of(model: Model, data: Data) -> Data:
    """The samples on the model's device, refused where they cannot be smoothed.

    Raises:
        UserError: There are none, or they are not in [0, 1].
    """
    note_assumptions(data)
    if not len(data):
        raise UserError("there is nothing to certify: the data set is empty.")
    if data.x.is_floating_point() and not bool(((data.x >= 0) & (data.x <= 1)).all()):
        low, high = (float(value) for value in data.x.aminmax())
        raise UserError(
            f"x must lie in [0, 1], got values from {low:.4g} to {high:.4g}: sigma and radius are in its units. Scale "
            "it; normalisation belongs inside the model."
        )
    return data.to(device_of(model, data))


def batch_size_of(data: Data, batch_size: int | None) -> int:
    """Noisy images per query: as given, or by image size and device."""
    return default_batch_size(data.x) if batch_size is None else whole("batch_size", batch_size, 1)


def settings_of(vote: Vote, data: Data, seed: int) -> dict[str, Any]:
    """What a checkpoint belongs to, beside network and data."""
    return {
        "sigma": vote.sigma, "n": vote.n, "n0": vote.n0, "alpha": vote.alpha, "seed": int(seed), "samples": len(data),
    }  # fmt: skip


class Probe:
    """A few noisy images whose answers must not depend on the rest of the batch, nor on when they are asked.

    Args:
        model: What is smoothed.
        data: The samples.
        vote: How it is asked.
        noise: Of the samples.

    Attributes:
        model: The same, counting its passes.
        classes: Number of logits.

    Raises:
        UserError: The answers differ, or the logits do not fit the labels.
    """

    def __init__(self, model: Model, data: Data, vote: Vote, noise: Noise) -> None:
        self.model = CountingModel(model, occurring=data.y.unique())
        few = slice(0, PROBED)
        x = pixels(data.x[few])
        clean = self.model(x).logits
        check_logits(model, clean, data, self.model.ruled_out)
        self.classes = clean.shape[1]
        self.x = x + vote.sigma * noise[few].fold(SmoothingStream.PROBE).gaussian(tuple(x.shape[1:]))
        self.first = self.model(self.x).logits
        self.repeat()

    def repeat(self) -> None:
        """Ask them again, in other batches. Raises UserError where an answer is another one."""
        parts = [part for part in (self.x[:1], self.x[1 : PROBED // 2], self.x[PROBED // 2 :]) if len(part)]
        again = torch.cat([self.model(part).logits for part in parts])
        differ = int(differs_off_data(self.first, again).sum())
        if differ:
            raise UserError(
                f"the network answers {differ} of {len(self.x)} noisy images otherwise when they are asked again in "
                "another batch: votes must be those of one fixed classifier, or their count proves nothing. Look for "
                "dropout or noise of its own, batch norm without running statistics, state and caches."
            )


class _About(TypedDict):
    """What a checkpoint holds beside tensors."""

    identity: dict[str, Any]
    done: int
    forwards: int
    backwards: int
    seconds: float


class Work:
    """Work in units, in order, whose tensors are saved as it goes.

    Args:
        path: The checkpoint; None saves nothing.
        identity: What the work is; a checkpoint of another one is refused.
        model: Counts the passes.

    Attributes:
        tensors: What the work fills in.
        done: Units done.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any], model: CountingModel) -> None:
        self.path, self.identity, self.model = None if path is None else Path(path), identity, model
        self.tensors: dict[str, Tensor] = {}
        self.done, self.done_earlier, self.earlier = 0, 0, Cost()
        self.began = time.perf_counter()
        self.forwards, self.backwards = model.forwards, model.backwards
        self.next_save = self.began + INTERVAL

    def open(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.int32) -> None:
        """Read the checkpoint, or begin with zeros of these shapes. Raises UserError for one of other work."""
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        if self.path is None or not self.path.exists():
            return
        tensors, about = load_tensors(self.path, CHECKPOINT, CHECKPOINT_VERSION, _About)
        if about["identity"] != self.identity:
            raise UserError(f"{self.path} belongs to another certificate. Name another folder.")
        with understood(self.path):
            if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes or about["done"] < 0:
                raise ValueError("columns of other shapes")
            self.tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        self.done = self.done_earlier = about["done"]
        self.earlier = Cost(about["forwards"], about["backwards"], about["seconds"])

    @property
    def cost(self) -> Cost:
        """What it took so far, in earlier processes too."""
        return Cost(
            self.earlier.forwards + self.model.forwards - self.forwards,
            self.earlier.backwards + self.model.backwards - self.backwards,
            self.earlier.seconds + time.perf_counter() - self.began,
        )

    def through(
        self, start: int, end: int, size: int, step: Callable[[int, int], None], report: Callable[[int], None]
    ) -> None:
        """Do the units from ``start`` to ``end`` that are not done: step(first, last), so many at a time."""
        while start <= self.done < end:
            last = min(self.done + size, end)
            step(self.done - start, last - start)
            self.done = last
            if time.perf_counter() > self.next_save:
                self.save()
            report(last)

    def finish(self) -> Cost:
        """Write the checkpoint, unless it was complete already; and what all of the work took."""
        if self.done == self.done_earlier:
            return self.earlier
        self.save()
        return self.cost

    def save(self) -> None:
        """Write the checkpoint."""
        if self.path is None:
            return
        began, cost = time.perf_counter(), self.cost
        about = {"identity": self.identity, "done": self.done, "forwards": cost.forwards, "backwards": cost.backwards}
        packed = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        save_tensors(
            self.path, CHECKPOINT, CHECKPOINT_VERSION, self.tensors, {**about, "seconds": cost.seconds}, packed=packed
        )
        ended = time.perf_counter()
        self.next_save = ended + max(INTERVAL, SHARE * (ended - began))


def count_votes(
    work: Work,
    x: Tensor,
    noise: Noise,
    vote: Vote,
    batches: Batches,
    report: Progress,
    *,
    unless: Tensor | None = None,
    what: str = "votes",
) -> Tensor:
    """Count noisy votes into ``work.tensors``: "counts" (N, K) of the selection, then "votes" (N,) for that class.

    Samples and votes share the batches. The selection is over before the first of the n votes is counted.

    Args:
        work: Opened.
        x: (N, ...), uint8 or float in [0, 1].
        noise: Of these samples.
        vote: How the smoothed classifier is asked.
        batches: The batch size.
        report: Told (what, votes so far, votes in all).
        unless: (N,) classes; a sample for which its class is selected is asked no further.
        what: What is being done.

    Returns:
        (N,) int64, the selected classes.
    """
    counts, votes, shape = work.tensors["counts"], work.tensors["votes"], tuple(x.shape[1:])
    n_selecting, classes = len(x) * vote.n0, counts.shape[1]

    def predict(rows: Tensor, numbers: Tensor, stream: SmoothingStream) -> tuple[Tensor, Tensor]:
        """(the class that each noisy image is given, whether it is given one)."""
        noisy = pixels(x[rows]) + vote.sigma * noise[rows].fold(stream).gaussian(shape, numbers)
        z = work.model(noisy).logits
        return z.argmax(1), z.isfinite().all(1)

    def select(pairs: Tensor) -> None:
        rows = pairs // vote.n0
        predicted, valid = predict(rows, pairs % vote.n0, SmoothingStream.SELECTION)
        counts.view(-1).index_add_(0, rows * classes + predicted, valid.to(counts.dtype))

    def in_batches(count: Callable[[Tensor], None]) -> Callable[[int, int], None]:
        def step(first: int, last: int) -> None:
            batches.map(torch.arange(first, last, device=x.device), count)

        return step

    total = n_selecting + len(x) * vote.n
    report(what, work.done, total)
    work.through(0, n_selecting, batches.size, in_batches(select), lambda done: report(what, done, total))
    selected = counts.argmax(1)
    asked = torch.arange(len(x), device=x.device) if unless is None else torch.nonzero(selected != unless)[:, 0]

    def confirm(pairs: Tensor) -> None:
        rows = asked[pairs // vote.n]
        predicted, valid = predict(rows, pairs % vote.n, SmoothingStream.VOTES)
        votes.index_add_(0, rows, ((predicted == selected[rows]) & valid).to(votes.dtype))

    total = n_selecting + len(asked) * vote.n
    work.through(n_selecting, total, batches.size, in_batches(confirm), lambda done: report(what, done, total))
    return selected
