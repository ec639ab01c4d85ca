"""The bracket of a network's accuracy under a threat: certified <= truth <= attacked, and which samples lie between."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..results import CLOPPER_PEARSON, Interval, Row, percent, proportion, threat_text
from ..threat import Threat

FATES = ("between", "misclassified", "broken", "proved")  # of a sample; a file holds their numbers


@dataclass(frozen=True)
class StepCost:
    """What one step of a bracket did: the clean pass, an attack, or a method of proof.

    Args:
        name: of the step.
        samples: how many it was applied to.
        broken: how many of them it broke; those misclassified without an attack, for the clean pass.
        proved: how many of them it proved.
        seconds: wall-clock time.
    """

    name: str
    samples: int = 0
    broken: int = 0
    proved: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class AccuracyBracket:
    """What attacks broke and what proofs certified: columns of shape (N,), on the CPU.

    Args:
        threat: the threat of all columns.
        method: the last method of proof that was allowed.
        index: int64, the samples' places in the data set.
        y: int64, the labels.
        fate: int64, places in FATES.
        by: what decided each sample: an attack, a method of proof, "clean"; "" where nothing did.
        margin: float64, logit_y - largest other logit at x.
        margin_adv: float64, the smallest margin that was met within the threat.
        prediction_adv: int64, the class predicted there.
        bound: float64, a lower bound of the smallest margin over the threat; -inf where there is none.
        seconds: float64, what proving each sample cost.
        rows: (M,) int64, the broken samples.
        x_adv: (M, C, H, W), an adversarial example of each.
        steps: what each step did and cost.
        spent: wall-clock seconds in all, those of interrupted runs too.
        budget: seconds that were allowed; infinite for no limit.
        out_of_time: samples between for which time ran out; the methods had no more to say of the others.
        unconfirmed: adversarial examples of branch and bound that a fresh forward pass did not confirm.
        why_not: why nothing could be proved, in one sentence; "" where proofs were tried.
    """

    threat: Threat
    method: str
    index: Tensor
    y: Tensor
    fate: Tensor
    by: tuple[str, ...]
    margin: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    bound: Tensor
    seconds: Tensor
    rows: Tensor
    x_adv: Tensor
    steps: tuple[StepCost, ...]
    spent: float
    budget: float
    out_of_time: int = 0
    unconfirmed: int = 0
    why_not: str = ""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def status(self) -> tuple[str, ...]:
        """A word of FATES for each sample."""
        return tuple(FATES[number] for number in self.fate.tolist())

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples of each fate."""
        return {name: int((self.fate == number).sum()) for number, name in enumerate(FATES)}

    @property
    def certified(self) -> Interval:
        """The share that is proved: a lower bound of the accuracy under the threat, with its interval."""
        return proportion(self.counts["proved"], len(self))

    @property
    def attacked(self) -> Interval:
        """The share that nothing broke: an upper bound of the accuracy under the threat, with its interval."""
        return proportion(self.counts["proved"] + self.counts["between"], len(self))

    @property
    def exact(self) -> bool:
        """Whether nothing lies between: certified = attacked."""
        return self.counts["between"] == 0

    @property
    def proved_by(self) -> dict[str, int]:
        """How many samples each method proved, in the order of the methods."""
        proved = [name for name, fate in zip(self.by, self.status, strict=True) if fate == "proved"]
        order = ("interval", "lipschitz", "linear", "crown", "alpha", "branch")
        return {name: proved.count(name) for name in order if name in proved}

    def describe(self) -> dict[str, Any]:
        """The bracket as accuracy.json holds it: NaN and infinity are null."""
        columns = ("index", "y", "margin", "margin_adv", "prediction_adv", "bound", "seconds")
        held = {
            "threat": self.threat.describe(),
            "method": self.method,
            "samples": len(self),
            "sentence": sentence(self),
            "exact": self.exact,
            "certified": asdict(self.certified),
            "attacked": asdict(self.attacked),
            "counts": self.counts,
            "proved_by": self.proved_by,
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.spent,
            "budget": self.budget,
            "out_of_time": self.out_of_time,
            "unconfirmed": self.unconfirmed,
            "why_not": self.why_not,
            "columns": {
                **{name: getattr(self, name).tolist() for name in columns},
                "status": list(self.status),
                "by": list(self.by),
            },
        }
        plain: dict[str, Any] = without_nan(held)
        return plain


def sentence(found: AccuracyBracket) -> str:
    """Summarise a bracket: both ends, and what lies between.

    Args:
        found: the result of ``bracket_accuracy``.

    Returns:
        One to three sentences.
    """
    n, counts, low, high = len(found), found.counts, found.certified, found.attacked
    parts = []
    if found.exact:
        parts.append(
            f"Exact for these {n:,} samples: certified = attacked = {percent(low.value)}% under {found.threat}; "
            "every sample is proved or broken."
        )
    else:
        lie = "1 sample lies" if counts["between"] == 1 else f"{counts['between']:,} samples lie"
        parts.append(
            f"Certified {percent(low.value)}% <= accuracy under {found.threat} <= {percent(high.value)}% attacked: "
            f"{lie} between, of {n:,}."
        )
    if found.why_not:
        parts.append(f"Nothing could be proved, since {found.why_not.rstrip('.')}.")
    elif found.out_of_time:
        parts.append("Time ran out on them: the same command with a larger --budget goes on where this one stopped.")
    elif not found.exact and found.method != "branch":
        parts.append(f"The methods up to {found.method} leave them open: --method branch may decide them.")
    elif not found.exact:
        parts.append("Branch and bound had no ReLU left to split for them, or no memory: they stay open.")
    if found.unconfirmed:
        parts.append(
            f"{found.unconfirmed} adversarial example{'s' * (found.unconfirmed > 1)} of branch and bound did not hold "
            "in a fresh forward pass, and do not count."
        )
    return " ".join(parts)


def row(found: AccuracyBracket, name: str) -> Row:
    """A bracket as a row of results: clean, certified, and as robust what nothing broke; without a verdict.

    Args:
        found: the result of ``bracket_accuracy``.
        name: what the network is called.

    Returns:
        The row.
    """
    right = len(found) - found.counts["misclassified"]
    return Row(
        label=name, loss=name, threat=threat_text(found.threat.describe()), clean=proportion(right, len(found)),
        attacks={}, robust=found.attacked, status="", verdict="", n=len(found), seeds=(None,), interval=CLOPPER_PEARSON,
        runs=(0,), certified=found.certified, between=found.counts["between"],
    )  # fmt: skip


def table(found: AccuracyBracket) -> str:
    """A bracket as aligned text: a line for each step, then both ends with their 95% Clopper-Pearson intervals.

    Args:
        found: the result of ``bracket_accuracy``.

    Returns:
        The lines.
    """
    head = ("step", "samples", "broken", "proved", "seconds")
    lines = [
        (step.name, *(f"{count:,}" if count else "-" for count in (step.samples, step.broken, step.proved)),
         f"{step.seconds:.1f}")
        for step in found.steps
    ]  # fmt: skip
    widths = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]

    def aligned(line: tuple[str, ...]) -> str:
        first, *others = (
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "─" * len(aligned(head))
    ends = []
    for name, share in (("attacked", found.attacked), ("certified", found.certified)):
        count = round(share.value * len(found))
        ends.append(
            f"{name:<9}  {percent(share.value):>5}% [{percent(share.low)}, {percent(share.high)}]  "
            f"{count:,} of {len(found):,}"
        )
    by = ", ".join(f"{name} {count:,}" for name, count in found.proved_by.items())
    ends[1] += f": {by}" if by else ""
    ends.append(f"between    {found.counts['between']:>5,} sample{'s' * (found.counts['between'] != 1)}")
    return "\n".join([aligned(head), rule, *map(aligned, lines), rule, *ends])


def without_nan(value: Any) -> Any:
    """None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def witnesses(found: AccuracyBracket) -> dict[str, Tensor]:
    """What witnesses.safetensors holds: the adversarial examples, with their labels and margins.

    Args:
        found: the result of ``bracket_accuracy``.

    Returns:
        Columns of shape (M,), and x_adv.
    """
    rows = found.rows
    return {
        "rows": rows, "index": found.index[rows], "y": found.y[rows], "x_adv": found.x_adv,
        "margin": found.margin_adv[rows].to(torch.float32), "prediction": found.prediction_adv[rows],
    }  # fmt: skip
