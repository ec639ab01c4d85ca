"""The votes of a smoothed classifier: how it is asked, what their count proves, and work that is saved as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from scipy import stats
from torch import Tensor

from ..data import Data, pixels
from ..data.arguments import check_logits, note_assumptions
from ..errors import UserError
from ..io import content_hash, load_tensors, next_save, save_tensors, understood
from ..noise import Noise, SmoothingStream
from ..outputs import Model
from ..progress import Progress
from ..queries import Batches, CountingModel, default_batch_size, device_of, differs_off_data
from ..user_input import number, typed, whole

CHECKPOINT, CHECKPOINT_VERSION = "smoothing checkpoint", 1
LEAST_SIGMA, MOST_SIGMA = 1e-4, 10.0  # of pixels in [0, 1]: float32 must resolve the noise, and the noise the image
MOST_VOTES = 10**9
PROBED = 32  # noisy images that are asked again: alone, among others, and at the end


@dataclass(frozen=True)
class Cost:
    """What work took: passes, counted in images, and wall-clock seconds."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


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
def outvoted(votes: Tensor, votes_y: Tensor, alpha: float) -> Tensor:
    """Whether a class is more probable than y, with probability 1 - alpha: then the smoothed classifier's is not y.

    Of the votes for either, those for the class are Binomial(votes + votes_y, 1/2) or fewer where it is not.

    Args:
        votes: (N,) int64, for a class that other votes selected.
        votes_y: (N,) int64, for y, of the same n votes.
        alpha: In (0, 1).

    Returns:
        (N,) bool.

    Source: Hung and Fithian 2019, as in Cohen et al. 2019, PREDICT.

    >>> outvoted(torch.tensor([10, 9]), torch.tensor([0, 1]), 0.001), 2**-10 < 0.001 < 11 * 2**-10
    (tensor([ True, False]), True)
    """
    k, both = votes.cpu().numpy(), (votes + votes_y).cpu().numpy()
    return torch.from_numpy(stats.binom.sf(k - 1, both, 0.5) <= alpha) & (votes.cpu() > votes_y.cpu())


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
        "sigma": vote.sigma, "n": vote.n, "n0": vote.n0, "alpha": vote.alpha, "seed": int(seed),
        "samples": content_hash(data.x, data.y, data.index),
    }  # fmt: skip


class Probe:
    """A few noisy images whose answers must not depend on the rest of the batch, nor on when they are asked.

    They are asked first in a batch as large as those of the votes, among more noisy copies; later in small ones.

    Args:
        model: What is smoothed.
        data: The samples.
        vote: How it is asked.
        noise: Of the samples.
        batches: The batch size of the votes.
        occurring: The labels that occur in all of the data; None for those of these samples.

    Attributes:
        model: The same, counting its passes.
        classes: Number of logits.
        first: (P, K), the first answers.

    Raises:
        UserError: The answers differ, or the logits do not fit the labels.
    """

    def __init__(
        self, model: Model, data: Data, vote: Vote, noise: Noise, batches: Batches, occurring: Tensor | None = None
    ) -> None:
        self.model = CountingModel(model, occurring=data.y.unique() if occurring is None else occurring)
        few = min(PROBED, len(data))
        x, noise = pixels(data.x[:few]), noise[:few].fold(SmoothingStream.PROBE)
        clean = self.model(x).logits
        check_logits(model, clean, data, self.model.ruled_out)
        self.classes = clean.shape[1]

        def noisy(places: Tensor) -> Tensor:
            rows = places % few
            return x[rows] + vote.sigma * noise[rows].gaussian(tuple(x.shape[1:]), places // few)

        places = torch.arange(max(few, batches.size), device=x.device)
        answers = batches.map(places, lambda some: self.model(noisy(some)).logits)
        self.x, self.first = noisy(places[:few]), torch.cat(answers)[:few]
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
        probe: Of the network, whose passes it counts; a checkpoint of one that answers otherwise is refused.

    Attributes:
        tensors: What the work fills in.
        done: Units done.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any], probe: Probe) -> None:
        self.path, self.identity, self.probe = None if path is None else Path(path), identity, probe
        self.model = probe.model
        self.tensors: dict[str, Tensor] = {}
        self.done, self.done_earlier, self.earlier = 0, 0, Cost()
        self.began = time.perf_counter()
        self.forwards, self.backwards = self.model.forwards, self.model.backwards
        self.next_save = next_save(self.began)

    def open(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.int32) -> None:
        """Read the checkpoint, or begin with zeros of these shapes. Raises UserError for one of other work."""
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        if self.path is None or not self.path.exists():
            return
        tensors, about = load_tensors(self.path, CHECKPOINT, CHECKPOINT_VERSION, _About)
        if about["identity"] != self.identity:
            raise UserError(f"{self.path} belongs to another certificate. Name another folder.")
        with understood(self.path):
            answers = tensors.pop("probe").to(device)
            if answers.shape != self.probe.first.shape or bool(differs_off_data(answers, self.probe.first).any()):
                raise UserError("it belongs to a network that answers otherwise. Name another folder.")
            if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes or about["done"] < 0:
                raise ValueError("columns of other shapes")
            self.tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        self.done = self.done_earlier = about["done"]
        self.earlier = Cost(about["forwards"], about["backwards"], about["seconds"])

    def open_votes(self, samples: int, classes: int, device: torch.device) -> None:
        """The same for the counts of ``count_votes``."""
        column = (samples,)
        self.open({"counts": (samples, classes), "votes": column, "votes_y": column}, device)

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
        tensors = {**self.tensors, "probe": self.probe.first}
        save_tensors(
            self.path, CHECKPOINT, CHECKPOINT_VERSION, tensors, {**about, "seconds": cost.seconds}, packed=packed
        )
        self.next_save = next_save(began)


class Counted(NamedTuple):
    """What votes say, a column each, (N,) int64 on the model's device.

    Attributes:
        selected: the class that the n0 votes selected.
        votes: how many of the n votes are for it.
        votes_y: how many of them are for y.
    """

    selected: Tensor
    votes: Tensor
    votes_y: Tensor


def count_votes(
    work: Work,
    data: Data,
    noise: Noise,
    vote: Vote,
    batches: Batches,
    report: Progress,
    *,
    only_wrong: bool = False,
    what: str = "votes",
) -> Counted:
    """Count noisy votes into ``work.tensors``: "counts" (N, K) of the selection, then "votes" and "votes_y" (N,).

    Samples and votes share the batches. The selection is over before the first of the n votes is counted.

    Args:
        work: Opened.
        data: The samples.
        noise: Of these samples.
        vote: How the smoothed classifier is asked.
        batches: The batch size.
        report: Told (what, votes so far, votes in all).
        only_wrong: Ask no further about a sample for which y is selected.
        what: What is being done.

    Returns:
        The counts.
    """
    x, shape = data.x, tuple(data.x.shape[1:])
    counts, votes, votes_y = (work.tensors[name] for name in ("counts", "votes", "votes_y"))
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
    asked = torch.nonzero(selected != data.y)[:, 0] if only_wrong else torch.arange(len(x), device=x.device)

    def confirm(pairs: Tensor) -> None:
        rows = asked[pairs // vote.n]
        predicted, valid = predict(rows, pairs % vote.n, SmoothingStream.VOTES)
        added = [((predicted == of[rows]) & valid).to(votes.dtype) for of in (selected, data.y)]
        votes.index_add_(0, rows, added[0])
        votes_y.index_add_(0, rows, added[1])

    total = n_selecting + len(asked) * vote.n
    work.through(n_selecting, total, batches.size, in_batches(confirm), lambda done: report(what, done, total))
    return Counted(selected, votes.long(), votes_y.long())
