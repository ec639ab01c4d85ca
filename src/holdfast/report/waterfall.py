"""The waterfall: from the PGD-50 accuracy down to the robust one, one change of the attack at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from ..errors import UserError
from ..results import Run, heading, percent, proportion
from ..user_input import typed
from .figures import CLEAN, INK, LOST, MUTED, PAPER, PGD50, ROBUST, axes, percent_axis, short, style, write_figure

# What each stage of the suite "explain" changes. Every stage attacks the survivors of those before it; the one on the
# training loss attacks all correct samples, so that the accuracy under it alone is known too.
CHANGES = {
    "clean": "no attack",
    "pgd50": "F.cross_entropy in float32, 50 PGD steps of eps/4, one start, last iterate",
    "stable arithmetic": "the same steps on u, the loss without its softplus; its gradient does not vanish in float32",
    "best iterate": "the most adversarial iterate, not the last one",
    "more steps": "200 steps of eps/10 instead of 50 of eps/4",
    "restarts": "5 random starts instead of 1",
    "targets": "targeted at each of the 9 most likely wrong classes",
    "other scores": "APGD on DLR, 100 steps",
    "black box": "Square, 1,000 queries, no gradients",
    "pgd50-train-loss": "the PGD-50 steps on the training loss",
    "audit": "whatever the trust checks broke",
    "region": "the smallest perturbation, FMN",
}

CAPTION = (
    "correct: % of all samples that nothing so far broke; points: what the change took; passes each: forward and "
    "backward passes for each sample; audit: the trust checks; region: the smallest perturbations, for the report"
)


@dataclass(frozen=True)
class Step:
    """One change of the attack.

    Attributes:
        name: the stage's name.
        correct: number of samples still correct after it.
        n: number of samples.
        passes: forward and backward passes of the stage, summed over samples.
    """

    name: str
    correct: int
    n: int
    passes: int

    @property
    def accuracy(self) -> float:
        """Accuracy after the step."""
        return self.correct / self.n


@typed
def steps(run: Run) -> list[Step]:
    """The waterfall of one run, from the clean images to the last stage.

    Args:
        run: a run with per-sample columns.

    Returns:
        One step per stage.

    Raises:
        UserError: the run keeps no per-sample columns, or its measurement is void.
    """
    if run.robust is None:
        why = f": {run.verdict.why}" if run.verdict else ""
        raise UserError(f"the measurement of '{run.name}' is void, so there is nothing to explain{why}.")
    if run.samples is None:
        raise UserError(f"'{run.name}' keeps no per-sample columns: there is nothing to explain.")
    correct = sum(run.samples.clean)
    out = []
    for stage in run.stages:
        correct -= stage.broken
        out.append(Step(stage.name, correct, run.n, stage.passes))
    return out


@typed
def table(run: Run, bar: int = 24) -> Table:
    """The waterfall as a table for a terminal of 80 columns.

    Args:
        run: as for :func:`steps`.
        bar: width of the bars in characters.

    Returns:
        An object that ``rich`` prints.

    Raises:
        UserError: as :func:`steps` raises.
    """
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=CAPTION, caption_justify="left")
    out.add_column("change", no_wrap=True)
    out.add_column("correct", justify="right", no_wrap=True)
    out.add_column("points", justify="right", no_wrap=True)
    out.add_column("", no_wrap=True)
    out.add_column("passes each", justify="right")
    before = None
    for step in steps(run):
        lost = "" if before is None or before == step.correct else f"-{percent((before - step.correct) / step.n)}"
        full = round(bar * step.accuracy)
        gone = 0 if before is None else round(bar * before / step.n) - full
        blocks = "█" * full + "░" * gone
        name = heading(step.name)
        out.add_row(name, percent(step.accuracy), lost, f"{blocks:<{bar}}", f"{step.passes / step.n:,.0f}")
        before = step.correct
    return out


@typed
def sentence(run: Run) -> str:
    """The waterfall in words: how much of the PGD-50 accuracy is lost, and to which change most.

    Args:
        run: as for :func:`steps`.

    Returns:
        One or two sentences.

    Raises:
        UserError: as :func:`steps` raises.
    """
    by_name = {step.name: step for step in steps(run)}
    last, pgd50 = list(by_name.values())[-1], by_name["pgd50"]
    robust = proportion(last.correct, last.n)
    interval = f"95% interval {percent(robust.low)} to {percent(robust.high)}"
    trained = run.attacks.get("pgd50-train-loss")
    alone = "" if trained is None else f" On its own, PGD-50 on the training loss leaves {percent(trained.value)}%."
    if pgd50.correct == last.correct:
        return (
            f"No change lowers the PGD-50 accuracy of {percent(pgd50.accuracy)}%, an upper bound ({interval}).{alone}"
        )
    pairs = list(zip(list(by_name.values())[1:], list(by_name.values())[2:], strict=False))
    before, most = max(pairs, key=lambda pair: pair[0].correct - pair[1].correct)
    points = percent((before.correct - most.correct) / last.n)
    return (
        f"PGD-50 reports {percent(pgd50.accuracy)}%, but robust accuracy is at most {percent(last.accuracy)}% "
        f"({interval}). "
        f"The largest drop, {points} points, comes from '{heading(most.name)}': "
        f"{CHANGES.get(most.name, 'a stage of the suite')}.{alone}"
    )


@typed
def figure(run: Run) -> Figure:
    """The waterfall as a chart: a bar for each change, what it broke in colour, lines join the accuracies.

    Args:
        run: as for :func:`steps`.

    Returns:
        The figure.

    Raises:
        UserError: as :func:`steps` raises.
    """
    shown = steps(run)
    with style():
        chart, ax = axes(len(shown), 0.5, 0.35)
        name = f"{short(run.name)}, {run.threat_text}, {run.n:,} samples"
        ax.set_title(name, loc="left", fontsize=8, color=INK)
        for i, step in enumerate(shown):
            before = shown[i - 1].accuracy if i else step.accuracy
            ends = i == 0 or step.name == "pgd50" or i == len(shown) - 1
            at, now = i + 0.66, 100 * step.accuracy
            colour = CLEAN if i == 0 else PGD50 if step.name == "pgd50" else ROBUST
            above_lines = {"zorder": 5, "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}}
            ax.text(0, i + 0.3, heading(step.name), va="center", fontweight="bold").set(**above_lines)
            change = ax.text(118, i + 0.3, CHANGES.get(step.name, ""), va="center", ha="right", color=MUTED)
            change.set(fontsize=6.5, **above_lines)
            if ends:
                ax.barh(at, now, height=0.3, color=colour, zorder=2)
            if i and before > step.accuracy:
                ax.barh(at, 100 * before - now, left=now, height=0.3, color=LOST, zorder=2.5)
            if i < len(shown) - 1:
                ax.plot([now, now], [at - 0.15, i + 1.51], color=MUTED, linewidth=0.8, zorder=3)
            lost = f"  (-{percent(before - step.accuracy)})" if i and before > step.accuracy else ""
            end = 100 * proportion(step.correct, step.n).high if i == len(shown) - 1 else max(now, 100 * before)
            ax.text(end + 1, at, f"{percent(step.accuracy)}{lost}", va="center")
        robust = proportion(shown[-1].correct, shown[-1].n)
        at = len(shown) - 0.34
        ax.plot([100 * robust.low, 100 * robust.high], [at, at], color=INK, linewidth=1.4, zorder=4)
        percent_axis(ax, "correct samples, % (the last is an upper bound; 95% interval)", most=118)
    return chart


@typed
def save(run: Run, folder: str | Path) -> list[Path]:
    """Write waterfall.svg, waterfall.png and waterfall.pdf.

    Args:
        run: as for :func:`steps`.
        folder: where to.

    Returns:
        The paths.

    Raises:
        UserError: as :func:`steps` raises, or a file cannot be written.
    """
    return write_figure(figure(run), folder, "waterfall")
