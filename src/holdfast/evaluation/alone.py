"""Attacks that stand alone: each run on every sample that is right, each with an accuracy of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..attacks import PGD50, PGD50_TRAIN_LOSS, Stage
from ..errors import UserError

FIELDS = {PGD50.name: "pgd50", PGD50_TRAIN_LOSS.name: "own"}  # those with a field of their own in an Evaluation


def is_published(stage: Stage) -> bool:
    """Whether it is the published protocol, under whatever name: a suite may name it, it is run once.

    >>> is_published(PGD50), is_published(PGD50_TRAIN_LOSS)
    (True, False)
    """
    return replace(stage, name=PGD50.name) == PGD50


def column_of(stage: Stage) -> str:
    """What the cascade calls the column of a stage that stands alone."""
    return FIELDS["pgd50"] if is_published(stage) else FIELDS.get(stage.name, f"alone/{stage.name}")


def shown(stages: Sequence[Stage]) -> dict[str, str]:
    """Name -> column of all that stand alone, in order, the published protocol first unless the suite gives its place.

    Empty where there are only those with a field of their own. Raises UserError for two of one name, and for another
    attack under the published one's name.

    >>> shown([PGD50_TRAIN_LOSS])
    {}
    >>> shown([Stage("pgd10", "pgd", individual=True)])
    {'pgd50': 'pgd50', 'pgd10': 'alone/pgd10'}
    """
    alone = [stage for stage in stages if stage.individual]
    names = [stage.name for stage in alone]
    for stage in alone:
        if names.count(stage.name) > 1:
            raise UserError(f"two stages that stand alone are called '{stage.name}': each needs a name of its own.")
        if stage.name == PGD50.name and not is_published(stage):
            raise UserError(f"'{PGD50.name}' names the published protocol: give this stage another name.")
    if set(names) <= set(FIELDS):
        return {}
    columns = {stage.name: column_of(stage) for stage in alone}
    first = {} if "pgd50" in columns.values() else {PGD50.name: "pgd50"}
    return {**first, **columns}
