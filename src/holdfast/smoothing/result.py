"""The result: what is certified of the smoothed classifier at each radius, and what attacks leave of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..bounds.smoothing import Smoothed
from ..bounds.votes import Cost
from ..results import Interval, percent, proportion
from ..results.terminal import Printed
from ..user_input import typed

METHOD = (
    "What is certified is the smoothed classifier, which answers by noisy votes, and not the network itself; each "
    "sample's certificate holds with probability {confidence}."
)


@dataclass(frozen=True)
class SmoothedAccuracy:
    """[certified, attacked] accuracy of the smoothed classifier under l2, at any radius; not of the network.

    Args:
        smoothed: Classes, votes and certified radii, sample by sample.
        radii: The radii that were attacked, ascending.
        broken_at: (N,) float64, the smallest of them at which the smoothed classifier's class was found to be another
            than y, with probability 1 - alpha; 0 where it is at x itself, infinite where none was found.
        steps: Steps of the attack.
        copies: Noisy copies whose mean the attack climbs.
        costs: What the attack and the votes at its points took, for each radius.
    """

    smoothed: Smoothed
    radii: tuple[float, ...]
    broken_at: Tensor
    steps: int
    copies: int
    costs: tuple[Cost, ...]

    def __len__(self) -> int:
        return len(self.smoothed)

    @typed
    def certified(self, radius: float) -> Tensor:
        """(N,) bool: certified at this l2 radius, and not found broken within it."""
        return self.smoothed.certified(radius) & (self.broken_at > radius)

    @typed
    def certified_accuracy(self, radius: float) -> Interval:
        """The share of ``certified``, with its 95% interval over samples."""
        return proportion(int(self.certified(radius).sum()), len(self))

    @typed
    def attacked_accuracy(self, radius: float) -> Interval:
        """The share of samples that were not found broken within this radius, with its 95% interval over samples."""
        return proportion(int((self.broken_at > radius).sum()), len(self))

    @property
    def conflicts(self) -> Tensor:
        """(N,) bool: certified and broken at one radius. Each happens by chance with a probability of alpha or less."""
        both = torch.zeros(len(self), dtype=torch.bool)
        for radius in self.radii:
            both |= self.smoothed.certified(radius) & (self.broken_at <= radius)
        return both

    def describe(self) -> dict[str, Any]:
        """The result as smoothing.json holds it; null where a sample was not found broken."""
        smoothed, vote = self.smoothed, self.smoothed.vote
        return {
            "method": METHOD.format(confidence=confidence_text(vote.alpha)),
            "norm": "l2",
            **asdict(vote),
            "largest_radius": vote.largest_radius,
            "steps": self.steps,
            "copies": self.copies,
            "samples": len(self),
            "abstentions": int(smoothed.abstains.sum()),
            "conflicts": int(self.conflicts.sum()),
            "radii": [
                {
                    "radius": radius,
                    "certified": asdict(self.certified_accuracy(radius)),
                    "attacked": asdict(self.attacked_accuracy(radius)),
                }
                for radius in (0.0, *self.radii)
            ],
            "costs": [
                {"name": "votes", **asdict(smoothed.cost)},
                *(
                    {"name": f"attack l2 {r:g}", **asdict(cost)}
                    for r, cost in zip(self.radii, self.costs, strict=False)
                ),
            ],
            "columns": {
                "index": smoothed.index.tolist(),
                "y": smoothed.y.tolist(),
                "prediction": smoothed.prediction.tolist(),
                "selected": smoothed.selected.tolist(),
                "votes": smoothed.votes.tolist(),
                "votes_y": smoothed.votes_y.tolist(),
                "p_low": smoothed.p_low.tolist(),
                "radius": smoothed.radius.tolist(),
                "broken_at": [None if at > 1e300 else at for at in self.broken_at.tolist()],
            },
        }


def confidence_text(alpha: float) -> str:
    """1 - alpha in percent.

    >>> confidence_text(0.001), confidence_text(0.05)
    ('99.9%', '95%')
    """
    return f"{100 * (1 - alpha):.10g}%"


@typed
def sentence(found: SmoothedAccuracy) -> str:
    """Summarise the result: what the smoothed classifier gets right, what is certified of it, what attacks break.

    Args:
        found: The result.

    Returns:
        Two to five sentences.
    """
    smoothed, vote = found.smoothed, found.smoothed.vote
    said = [
        f"Of {len(found)} samples the smoothed classifier (sigma {vote.sigma:g}) answers "
        f"{int(found.certified(0.0).sum())} correctly and abstains on {int(smoothed.abstains.sum())}."
    ]
    at = [
        f"at l2 {radius:g} {int(found.certified(radius).sum())} are certified and "
        f"{int((found.broken_at <= radius).sum())} wrong or broken"
        for radius in found.radii
    ]
    if at:
        said.append(f"{'; '.join(at)}.".capitalize())
    said.append(METHOD.format(confidence=confidence_text(vote.alpha)))
    if beyond := [f"{radius:g}" for radius in found.radii if radius >= vote.largest_radius]:
        said.append(
            f"Nothing could be certified at {', '.join(beyond)}: {vote.n:,} votes prove at most "
            f"{vote.largest_radius:.3g}, where all agree; more votes or a larger sigma prove more."
        )
    if conflicts := int(found.conflicts.sum()):
        said.append(
            f"{conflicts} of the samples were both certified and broken, which chance allows; they count as broken."
        )
    return " ".join(said)


@typed
def table(found: SmoothedAccuracy, name: str = "") -> Printed:
    """Certified and attacked accuracy at each radius, in percent, for a terminal.

    Args:
        found: The result.
        name: The network's name.

    Returns:
        An object that ``rich`` prints.
    """
    smoothed, vote = found.smoothed, found.smoothed.vote
    lines = []
    for radius in (0.0, *found.radii):
        certified = _cell(found.certified_accuracy(radius)) if radius < vote.largest_radius else "-"
        lines.append((f"{radius:g}", certified, _cell(found.attacked_accuracy(radius))))
    passes = sum(cost.forwards + cost.backwards for cost in (smoothed.cost, *found.costs))
    seconds = sum(cost.seconds for cost in (smoothed.cost, *found.costs))
    caption = (
        f"smoothed classifier{f' of {name}' if name else ''}, sigma {vote.sigma:g}, {len(found)} samples, {vote.n:,} "
        f"votes each, in percent; 95% Clopper-Pearson interval over samples; it abstains on "
        f"{int(smoothed.abstains.sum())}; {passes:,} passes, {seconds:.1f} s"
    )
    return Printed(("l2 radius", "certified, 95%", "attacked, 95%"), tuple(lines), caption)


def _cell(interval: Interval) -> str:
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"
