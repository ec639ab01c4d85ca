"""Results of the same data set as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..results import Results
from ..user_input import typed


@typed
def identity(results: Results) -> str:
    """A key that is equal for results of the same data set: name, fingerprint and class names."""
    return repr([results.data.get(key) for key in ("name", "fingerprint", "classes")])


@typed
def merged(sources: Sequence[Results]) -> list[Results]:
    """One Results per data set; a run that is given twice counts once."""
    groups: dict[str, Results] = {}
    for r in sources:
        key = identity(r)
        before = groups.get(key)
        new = r.runs if before is None else (*before.runs, *(run for run in r.runs if run not in before.runs))
        notes = [one for part in (before, r) if part for one in part.data.get("notes") or ()]
        data = {**(before or r).data, **({"notes": list(dict.fromkeys(map(str, notes)))} if notes else {})}
        groups[key] = dataclasses.replace(before or r, runs=new, data=data)
    return list(groups.values())
