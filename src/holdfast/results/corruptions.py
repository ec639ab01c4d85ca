"""Accuracy under corruptions: the kinds and severities of each row, their means, and what sums them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..user_input import typed
from .rows import Row, rows
from .schema import Results

CORRUPTIONS = "corruptions"  # the norm of their threats


@dataclass(frozen=True)
class CorruptionTable:
    """Accuracy of one network, or of several seeds, under each kind of corruption at each severity.

    Attributes:
        label: the loss or the network.
        severities: 1 to 5, ascending.
        accuracy: kind -> its accuracy at each severity, a proportion.
        every: the share that is right under every kind, at each severity.
    """

    label: str
    severities: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    every: tuple[float, ...]

    @property
    def means(self) -> tuple[float, ...]:
        """The mean over kinds at each severity."""
        return tuple(sum(column) / len(column) for column in zip(*self.accuracy.values(), strict=True))

    @property
    def mean(self) -> float:
        """The mean over kinds and severities."""
        return sum(self.means) / len(self.means)

    @property
    def lowest(self) -> tuple[str, float]:
        """The kind with the lowest mean over severities, and that mean."""
        means = {kind: sum(values) / len(values) for kind, values in self.accuracy.items()}
        kind = min(means, key=lambda name: means[name])
        return kind, means[kind]


@typed
def corruption_tables(results: Results) -> list[CorruptionTable]:
    """One table for each network or loss whose corruptions were evaluated, in order of first appearance.

    Args:
        results: the results.

    Returns:
        The tables; none where there are no corruptions.
    """
    groups: dict[tuple[str, tuple[str, ...]], dict[int, Row]] = {}
    for row in rows(results):
        if row.norm == CORRUPTIONS and row.attacks:
            label = row.label.removesuffix(f" ({row.threat})")
            severity = int(results.runs[row.runs[0]].threat["eps"])
            groups.setdefault((label, tuple(row.attacks)), {}).setdefault(severity, row)
    return [_table(label, kinds, found) for (label, kinds), found in groups.items()]


def _table(label: str, kinds: Sequence[str], found: dict[int, Row]) -> CorruptionTable:
    severities = tuple(sorted(found))
    shown = [found[severity] for severity in severities]
    return CorruptionTable(
        label,
        severities,
        {kind: tuple(row.attacks[kind].value for row in shown) for kind in kinds},
        tuple(row.robust.value if row.robust else 0.0 for row in shown),
    )


def mean_corrupted(row: Row) -> float | None:
    """The mean over kinds of a row's accuracy under corruptions; None for other threats."""
    if row.norm != CORRUPTIONS or not row.attacks:
        return None
    return sum(figure.value for figure in row.attacks.values()) / len(row.attacks)


def corruption_sentence(table: CorruptionTable) -> str:
    """What a table says, in a sentence.

    >>> corruption_sentence(CorruptionTable("sce", (1, 5), {"fog": (0.9, 0.5), "snow": (0.8, 0.2)}, (0.7, 0.1)))
    'sce: mean accuracy under 2 kinds of corruption 60.0% (severity 1: 85.0%, 5: 35.0%), lowest under snow, 50.0%.'
    """
    each = ", ".join(f"{s}: {100 * mean:.1f}%" for s, mean in zip(table.severities, table.means, strict=True))
    if len(table.severities) == 1:  # its mean is the mean
        each = str(table.severities[0])
    kind, least = table.lowest
    if len(table.accuracy) == 1:
        return f"{table.label}: mean accuracy under {kind} {100 * table.mean:.1f}% (severity {each})."
    return (
        f"{table.label}: mean accuracy under {len(table.accuracy)} kinds of corruption {100 * table.mean:.1f}% "
        f"(severity {each}), lowest under {kind}, {100 * least:.1f}%."
    )
