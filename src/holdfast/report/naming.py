"""Names of the reader's own: a title of the page and labels of its rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import UserError, unknown
from ..results import Results, rows
from ..user_input import typed
from .merge import merged


@typed
def named(
    results_list: Results | Sequence[Results], title: str = "", names: Mapping[str, str] | None = None
) -> list[Results]:
    """Results under names of your own: every page, figure and table made of them shows these.

    Args:
        results_list: one or several Results.
        title: of the page and of the captions; "": the name of the data.
        names: label or loss of a row -> the text to show for it. Where the loss is given and its rows differ in the
            threat, each keeps its threat in brackets.

    Returns:
        The Results, with ``title`` and ``labels`` in their ``data``; nothing else changes.

    Raises:
        UserError: no row has the name, a text is empty, or two rows would have the same text.
    """
    given = [results_list] if isinstance(results_list, Results) else list(results_list)
    names = dict(names or {})
    shown = [row for part in merged(given) for row in rows(part)]
    known = {name for row in shown for name in (row.label, row.loss)}
    for name, text in names.items():
        if name not in known:
            raise unknown("row", name, known)
        if not text.strip():
            raise UserError(f"the label of the row '{name}' is empty. Give the text to show.")
    own = {**({"title": title} if title else {}), **({"labels": names} if names else {})}
    out = [dataclasses.replace(one, data={**one.data, **own}) for one in given]
    for part in merged(out):
        for text, count in Counter(row.label for row in rows(part)).items():
            if count > 1:
                raise UserError(f"{count} rows would have the label '{text}'. Give each row a text of its own.")
    return out


def parse_label(text: str, known: Sequence[str]) -> tuple[str, str]:
    """Read ROW=TEXT, where ROW, a label or a loss, may hold "=" too: the longest known name counts.

    >>> parse_label("isce:s=10=I-SCE, s = 10", ["sce", "isce:s=10"])
    ('isce:s=10', 'I-SCE, s = 10')
    """
    found = max((name for name in known if text.startswith(f"{name}=")), key=len, default=None)
    if found is None and "=" not in text:
        raise UserError(f"cannot read the label '{text}': write ROW=TEXT, such as 'isce:s=10=I-SCE, s = 10'.")
    if found is None:
        raise unknown("row", text.rpartition("=")[0], known)
    return found, text[len(found) + 1 :].strip()
