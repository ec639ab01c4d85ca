"""From the published number down to what is left, one change of the attack at a time: as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .. import report
from ..errors import UserError
from ..results import Run, percent, proportion

# What each stage of the suite "explain" changes. Every stage attacks what the ones before it left standing; "own loss"
# attacks all that are right, so that its accuracy alone is known too.
CHANGES = {
    "clean": "no attack",
    "pgd50": "F.cross_entropy in float32, 50 PGD steps of eps/4, one start, the last iterate",
    "stable arithmetic": "the same steps climb u, the loss without its link, which never saturates",
    "best iterate": "the worst point on the way counts, not the last",
    "more steps": "200 steps of eps/10, not 50 of eps/4",
    "restarts": "5 random starts instead of 1",
    "targets": "towards each of the likeliest wrong classes, 9 at most",
    "other scores": "APGD on DLR, 100 steps",
    "black box": "Square, 1,000 queries: no gradient is asked for",
    "pgd50-train-loss": "the published steps on the loss that it was trained with",
    "audit": "whatever a trust check came across",
    "region": "the smallest perturbation that was found, FMN",
}


@dataclass(frozen=True)
class Step:
    """A change of the attack: how many samples stand after it, of n, and the passes that it took in all."""

    name: str
    stands: int
    n: int
    passes: int

    @property
    def accuracy(self) -> float:
        return self.stands / self.n


def steps(run: Run) -> list[Step]:
    """The waterfall of one run: what stands after each stage, from the clean images to the last one.

    Raises UserError for a run that keeps no samples, and for a void one: no figure of it stands.
    """
    if run.robust is None:
        why = f": {run.verdict.why}" if run.verdict else ""
        raise UserError(f"the measurement of '{run.name}' is void, so there is no figure to explain{why}.")
    if run.samples is None:
        raise UserError(f"'{run.name}' keeps no per-sample columns: there is nothing to explain.")
    stands = sum(run.samples.clean)
    found = []
    for stage in run.stages:
        stands -= stage.broken
        found.append(Step(stage.name, stands, run.n, stage.forwards + stage.backwards))
    return found


def table(run: Run, bar: int = 24) -> Table:
    """The waterfall for a terminal of 80 columns."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("change", no_wrap=True)
    out.add_column("stands", justify="right", no_wrap=True)
    out.add_column("points", justify="right", no_wrap=True)
    out.add_column("", no_wrap=True)
    out.add_column("passes each", justify="right")
    before = None
    for step in steps(run):
        lost = "" if before is None or before == step.stands else f"-{percent((before - step.stands) / step.n)}"
        full = round(bar * step.accuracy)
        gone = 0 if before is None else round(bar * before / step.n) - full
        drawn = "█" * full + "░" * gone
        out.add_row(step.name, percent(step.accuracy), lost, f"{drawn:<{bar}}", f"{step.passes / step.n:,.0f}")
        before = step.stands
    return out


def sentence(run: Run) -> str:
    """What the waterfall says."""
    found = {step.name: step for step in steps(run)}
    last, published = list(found.values())[-1], found["pgd50"]
    left = proportion(last.stands, last.n)
    interval = f"95% interval {percent(left.low)} to {percent(left.high)}"
    gap = published.stands - last.stands
    own = "" if run.own is None else f" PGD on the loss it was trained with, alone, leaves {percent(run.own.value)}%."
    if gap == 0:
        told = f"Nothing took a point from the published {percent(published.accuracy)}%, an upper bound ({interval})."
        return told + own
    pairs = list(zip(list(found.values())[1:], list(found.values())[2:], strict=False))
    most = max(pairs, key=lambda pair: pair[0].stands - pair[1].stands)
    took = percent((most[0].stands - most[1].stands) / last.n)
    return (
        f"Of the published {percent(published.accuracy)}% at most {percent(last.accuracy)}% is true ({interval}). "
        f"'{most[1].name}' took the most, {took} points: {CHANGES.get(most[1].name, 'a stage of the suite')}." + own
    )


def figure(run: Run) -> Figure:
    """The waterfall as a chart: a bar for each change, what it took in colour, what stands as a line between them."""
    found = steps(run)
    with report.style():
        chart, ax = report.axes(len(found), 0.5, 0.15)
        for i, step in enumerate(found):
            before = found[i - 1].accuracy if i else step.accuracy
            ends = i == 0 or step.name == "pgd50" or i == len(found) - 1
            at, now = i + 0.66, 100 * step.accuracy
            colour = report.CLEAN if i == 0 else report.PGD50 if step.name == "pgd50" else report.ROBUST
            ax.text(0, i + 0.3, step.name, va="center", fontweight="bold")
            told = ax.text(118, i + 0.3, CHANGES.get(step.name, ""), va="center", ha="right", color=report.MUTED)
            told.set(fontsize=6.5, zorder=5, bbox={"facecolor": report.PAPER, "edgecolor": "none", "pad": 0.5})
            if ends:
                ax.barh(at, now, height=0.3, color=colour, zorder=2)
            if i and before > step.accuracy:
                ax.barh(at, 100 * before - now, left=now, height=0.3, color=report.LOST, zorder=2.5)
            if i < len(found) - 1:
                ax.plot([now, now], [at - 0.15, i + 1.51], color=report.MUTED, linewidth=0.8, zorder=3)
            lost = f"  (-{percent(before - step.accuracy)})" if i and before > step.accuracy else ""
            end = 100 * proportion(step.stands, step.n).high if i == len(found) - 1 else max(now, 100 * before)
            ax.text(end + 1, at, f"{percent(step.accuracy)}{lost}", va="center")
        left = proportion(found[-1].stands, found[-1].n)
        at = len(found) - 0.34
        ax.plot([100 * left.low, 100 * left.high], [at, at], color=report.INK, linewidth=1.4, zorder=4)
        report.percent_axis(ax, "samples that stand, % (what is left is an upper bound; 95% interval)", most=118)
    return chart


def save(run: Run, folder: Path) -> list[Path]:
    """waterfall.svg and waterfall.png in the folder."""
    return report.write_figure(figure(run), folder, "waterfall")
