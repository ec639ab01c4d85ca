"""Measure [certified, attacked] of a smoothed classifier: votes at x, SmoothAdv, and votes at what it finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ..attacks import pgd
from ..bounds import certify_smoothed
from ..bounds.votes import (
    Cost,
    Probe,
    Vote,
    Work,
    batch_size_of,
    count_votes,
    outvoted,
    samples_of,
    settings_of,
)
from ..data import Data
from ..data.arguments import AnyData, as_data
from ..errors import UserError, type_of
from ..io import content_hash
from ..losses import negative_log_odds, negative_margin
from ..noise import Noise, SmoothingStream
from ..outputs import Model, Outputs, Queried, frozen_eval
from ..progress import Progress, as_progress
from ..queries import Batches, CountingModel, exact_float32
from ..threat import Threat, check_eps, column
from ..user_input import of_type, path, read_number, typed, whole
from .result import SmoothedAccuracy

STEPS, COPIES = 20, 32  # of the attack
MOST_STEPS, MOST_COPIES, MOST_RADII = 10_000, 10_000, 100
BEYOND_CHANCE = 1e-6  # probability below which samples that are certified and broken are no chance


class ExpectedModel(Queried):
    """The logarithm of the mean probability over noisy copies, as logits: a deterministic stand-in to attack.

    The copies are the same for every sample and at every step (common random numbers), so any attack can climb it.

    Args:
        model: What is smoothed.
        copies: (M, C, H, W), the noise of each copy.

    Source: SmoothAdv, Salman et al. 2019.
    """

    def __init__(self, model: CountingModel, copies: Tensor) -> None:
        super().__init__(model)
        self.copies = copies

    def __call__(self, x: Tensor) -> Outputs:
        """(N, C, H, W) -> Outputs with (N, K) logarithms of probabilities."""
        logits = self.model((x[:, None] + self.copies).flatten(0, 1)).logits
        log_p = logits.log_softmax(1).view(len(x), len(self.copies), -1)
        return Outputs(log_p.logsumexp(1) - math.log(len(self.copies)))


@typed
def smoothadv(model: ExpectedModel, x: Tensor, y: Tensor, threat: Threat, *, noise: Noise, steps: int) -> Tensor:
    """PGD on the expected loss of noisy copies (Salman et al. 2019), from x and from a random start.

    From x it climbs the log odds of the mean probability of y, a monotone function of SmoothAdv's loss that never
    saturates; from the random start the margin of the mean probabilities.

    Args:
        model: The mean over noisy copies.
        x: (N, C, H, W) in the threat's box.
        y: (N,) int64 labels.
        threat: In l2.
        noise: The random start of these samples.
        steps: Of PGD, >= 1.

    Returns:
        x_adv, (N, C, H, W), in the threat: whichever of the two ends has the smaller margin.
    """
    ends = [
        pgd(model, x, y, threat, score=score, noise=noise, steps=steps, random_start=start, iterate="last")
        for score, start in ((negative_log_odds, False), (negative_margin, True))
    ]
    with torch.no_grad():
        scores = [negative_margin(model(end), y) for end in ends]
    return torch.where(column(scores[1] > scores[0], x), ends[1], ends[0])


@typed
def smooth(
    model: Model,
    data: AnyData,
    sigma: float,
    radii: Any = (),
    *,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 0.001,
    steps: int = STEPS,
    copies: int = COPIES,
    seed: int = 0,
    batch_size: int | None = None,
    folder: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> SmoothedAccuracy:
    """Certify the smoothed classifier of a network, and attack it: [certified, attacked] accuracy at each l2 radius.

    ``certify_smoothed`` gives the certified radii. At each given radius every sample that is not broken yet, certified
    or not, is attacked by ``smoothadv``; the smoothed classifier is then asked at x_adv with fresh noise, by as many
    votes. The sample is broken if another class is more probable there than y, with probability 1 - alpha. All of it is
    about the smoothed classifier, not the network; and each statement about a sample holds with that probability.

    Args:
        model: As for ``certify_smoothed``.
        data: As for ``certify_smoothed``.
        sigma: As for ``certify_smoothed``.
        radii: l2 radii to attack at, in units of pixels in [0, 1]: a number or several, or their text, "0.25,0.5".
        n: As for ``certify_smoothed``.
        n0: As for ``certify_smoothed``.
        alpha: As for ``certify_smoothed``.
        steps: Steps of the attack, >= 1; each run takes as many, and there are two.
        copies: Noisy copies whose mean the attack climbs, >= 1.
        seed: As for ``certify_smoothed``.
        batch_size: As for ``certify_smoothed``.
        folder: An existing folder where the work is saved as it comes, and resumed from.
        key: What the saved work belongs to: network and data.
        progress: Called with (what is being done, units done, units in all).

    Returns:
        The SmoothedAccuracy.

    Raises:
        UserError: As ``certify_smoothed`` does; a radius of another norm, or one that covers all images; more samples
            that are certified and broken at once than chance allows.

    >>> net = lambda x: torch.cat([x.flatten(1) - 0.5, 0.5 - x.flatten(1)], 1)       # class 0 above 0.5
    >>> data = Data(torch.tensor([1.0, 0.6]).view(2, 1, 1, 1), torch.tensor([0, 0]), torch.arange(2), ("0", "1"), "it")
    >>> found = smooth(net, data, 0.125, "0.25", n=1000)
    >>> found.certified(0.25).tolist(), found.broken_at.tolist()
    ([True, False], [inf, 0.25])
    """
    vote, report, data = Vote(sigma, n, n0, alpha), as_progress(progress), as_data(data)
    radii = checked_radii(radii, data, steps=steps, copies=copies, batch_size=batch_size)
    data = samples_of(model, data)
    of_type("key", key, str)
    files = None if folder is None else path("folder", folder)
    smoothed = certify_smoothed(
        model, data, sigma, n=n, n0=n0, alpha=alpha, seed=seed, batch_size=batch_size, key=key, progress=report,
        checkpoint=None if files is None else files / "votes.safetensors",
    )  # fmt: skip
    broken_at = torch.where(smoothed.wrong, 0.0, torch.full(data.y.shape, math.inf, dtype=torch.float64))
    costs = []
    noise = Noise(int(seed), data.index)
    with exact_float32(), frozen_eval(model):
        for place, radius in enumerate(radii):
            rows = torch.nonzero(broken_at == math.inf)[:, 0].to(data.y.device)
            if not len(rows):
                costs.append(Cost())
                continue
            broken, cost = _broken(
                model, data.take(rows), noise[rows], vote, radius, place, steps=steps, copies=copies,
                size=batch_size_of(data, batch_size), folder=files, occurring=data.y.unique(), report=report,
                identity={"key": key, "radii": list(radii), **settings_of(vote, data, seed)},
            )  # fmt: skip
            broken_at[rows.cpu()[broken]] = radius
            costs.append(cost)
    found = SmoothedAccuracy(smoothed, radii, broken_at, steps, copies, tuple(costs))
    _check_conflicts(found)
    return found


def _broken(
    model: Model,
    data: Data,
    noise: Noise,
    vote: Vote,
    radius: float,
    place: int,
    *,
    steps: int,
    copies: int,
    size: int,
    folder: Path | None,
    occurring: Tensor,
    report: Progress,
    identity: dict[str, Any],
) -> tuple[Tensor, Cost]:
    """Which of these samples the attack at a radius breaks, (N,) bool, and what that took."""
    threat, shape, device = Threat("l2", radius), tuple(data.x.shape[1:]), data.y.device
    fresh = noise.fold(SmoothingStream.ATTACKED.numbered(place))  # of votes that no attack has seen
    with torch.no_grad():
        probe = Probe(model, data, vote, fresh, Batches(size), occurring)
    common = Noise(noise.seed, torch.arange(copies, device=device)).fold(SmoothingStream.COPIES).gaussian(shape)
    expected, batches = ExpectedModel(probe.model, vote.sigma * common), Batches(max(1, size // copies))
    identity = {**identity, "steps": steps, "copies": copies, "rows": content_hash(data.index)}

    def work_on(what: str) -> Work:
        file = None if folder is None else folder / f"{what}.safetensors"
        return Work(file, {**identity, "what": what}, probe)

    work = work_on(f"attack-l2-{place}")
    work.open({"x_adv": tuple(data.x.shape)}, device, torch.float32)
    starts = noise.fold(SmoothingStream.START, place)

    def attack(rows: Tensor) -> None:
        x = data.pixels(rows).float()
        found = smoothadv(expected, x, data.y[rows], threat, noise=starts[rows], steps=steps)
        work.tensors["x_adv"][rows] = found

    def step(first: int, last: int) -> None:
        batches.map(torch.arange(first, last, device=device), attack)

    what = f"attack l2 {radius:g}"
    report(what, work.done, len(data))
    work.through(0, len(data), batches.size, step, lambda done: report(what, done, len(data)))
    spent, x_adv = work.finish(), work.tensors["x_adv"]
    work = work_on(f"votes-l2-{place}")
    work.open_votes(len(data), probe.classes, device)
    with torch.no_grad():
        moved = replace(data, x=x_adv)
        counted = count_votes(
            work, moved, fresh, vote, Batches(size), report, only_wrong=True, what=f"votes at l2 {radius:g}"
        )
        cost = work.finish()
        probe.repeat()
    other = (counted.selected != data.y).cpu() & outvoted(counted.votes, counted.votes_y, vote.alpha)
    inside = threat.violation(x_adv, data.pixels(slice(None)).float()) == 0
    return other & inside.cpu(), Cost(
        spent.forwards + cost.forwards, spent.backwards + cost.backwards, spent.seconds + cost.seconds
    )


def _check_conflicts(found: SmoothedAccuracy) -> None:
    """Raise UserError where more samples are certified and broken than chance allows."""
    conflicts, chance = int(found.conflicts.sum()), min(1.0, (1 + len(found.radii)) * found.smoothed.vote.alpha)
    if conflicts and float(stats.binom.sf(conflicts - 1, len(found), chance)) < BEYOND_CHANCE:
        raise UserError(
            f"{conflicts} of {len(found)} samples are certified, and attacks break them all the same: more than chance "
            "allows. The votes are not those of one fixed classifier: look for state and caches in the network."
        )


def checked_radii(radii: Any, data: Data, *, steps: int, copies: int, batch_size: int | None) -> tuple[float, ...]:
    """The l2 radii, and the settings of the attack checked, before anything is done or written.

    Args:
        radii: As for ``radii_of``.
        data: The samples; no radius may cover all images of their size.
        steps: Of the attack.
        copies: Of the attack.
        batch_size: As for ``smooth``.

    Returns:
        The radii.

    Raises:
        UserError: A setting out of its range.
    """
    found = radii_of(radii)
    whole("steps", steps, 1, MOST_STEPS)
    whole("copies", copies, 1, MOST_COPIES)
    batch_size_of(data, batch_size)
    for radius in found:
        check_eps(Threat("l2", radius), math.prod(data.x.shape[1:]))
    return found


def radii_of(radii: Any) -> tuple[float, ...]:
    """The l2 radii that an argument is, ascending, each once.

    Args:
        radii: A number, a text such as "0.25,64/255" or "l2:0.5", a Threat, or several of these.

    Returns:
        The radii.

    Raises:
        UserError: No positive number, or another norm than l2.

    >>> radii_of("0.5,l2:0.25"), radii_of(1)
    ((0.25, 0.5), (1.0,))
    """
    if isinstance(radii, str):
        every: Sequence[Any] = [part.strip() for part in radii.split(",")]
    else:
        every = list(radii) if isinstance(radii, (list, tuple)) else [radii]
    found = sorted({_radius(one) for one in every})
    if len(found) > MOST_RADII:
        raise UserError(f"radii names {len(found)} radii: at most {MOST_RADII} are attacked.")
    return tuple(found)


def _radius(one: Any) -> float:
    if isinstance(one, str):
        value = read_number(one.removeprefix("l2:").strip())
        one = value if value is not None else Threat.parse(one) if ":" in one else one
    if isinstance(one, Threat):
        if one.norm != "l2":
            wider = "eps sqrt(d) around images of d values" if one.norm == "linf" else "the same radius"
            raise UserError(
                f"randomised smoothing certifies l2 and not {one.norm}: give the radius in l2, such as 0.5. An "
                f"{one.norm} ball of eps lies in the l2 ball of {wider}; holdfast evaluate --threat {one.norm}:EPS "
                "certifies the network itself by bounds."
            )
        one = one.eps
    if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 < one < math.inf:
        got = type_of(one) if not isinstance(one, (str, int, float)) else repr(one)
        raise UserError(f"a radius must be a positive number, in units of pixels in [0, 1], such as 0.5, got {got}.")
    return float(one)
