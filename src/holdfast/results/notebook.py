"""Results as HTML for a notebook: self-contained, escaped, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..user_input import typed
from .rows import rows
from .schema import Results, StageCost
from .statistics import proportion
from .text import caption, cells, doubts, heading, holds_words, percent

_CELL = "padding:.15em .6em;white-space:nowrap;text-align:"
_RULE = "border-bottom:1px solid rgba(128,128,128,.5)"  # a grey that shows on white and on black; no other colour


@typed
def notebook(results: Results) -> str:
    """The table of results, and below it a line for each verdict that is neither tight nor exact.

    Args:
        results: the results.

    Returns:
        HTML.
    """
    shown = rows(results)
    if not shown:
        return "<p>No runs.</p>"
    head, *texts = cells(shown)
    several = len({row.threat for row in shown}) > 1
    lines, before = [], ""
    for row, (label, *rest) in zip(shown, texts, strict=True):
        if several and row.threat != before:
            part = f'<th colspan="{len(head)}" style="{_CELL}left;padding-top:.8em">{escape(row.threat)}</th>'
            lines.append(f"<tr>{part}</tr>")
            before = row.threat
        name = label.removesuffix(f" ({row.threat})") if several else label
        lines.append(_html_row(head, [name, *rest], "td"))
    doubtful = [f"<li>{escape(line)}</li>" for line in doubts(results)]
    why = f"<details><summary>in doubt: {len(doubtful)}</summary><ul>{''.join(doubtful)}</ul></details>"
    return _html_table(_html_row(head, head, "th"), lines, caption(results, shown)) + (why if doubtful else "")


def notebook_counts(
    about: str, n: int, counts: Mapping[str, int | None], stages: Sequence[StageCost] = (), note: str = ""
) -> str:
    """One evaluation, from plain numbers.

    Args:
        about: what was evaluated, such as the threat; part of the caption.
        n: number of samples.
        counts: name of an accuracy ("clean", "pgd50", ...) -> number of correct samples; None is left out.
        stages: the attack cascade in order.
        note: a sentence below the table.

    Returns:
        HTML: each accuracy with its 95% Clopper-Pearson interval.
    """
    head = ("accuracy", "%", "95%")
    shares = {heading(name): proportion(k, n) for name, k in counts.items() if k is not None and n}
    lines = [
        _html_row(head, (name, percent(share.value), f"[{percent(share.low)}, {percent(share.high)}]"), "td")
        for name, share in shares.items()
    ]
    out = _html_table(_html_row(head, head, "th"), lines, f"{about}, {n:,} samples; Clopper-Pearson intervals")
    if stages:
        heads = ("stage", "attacked", "broken", "passes", "seconds")
        texts = [(s.name, f"{s.attacked:,}", f"{s.broken:,}", f"{s.passes:,}", f"{s.seconds:.1f}") for s in stages]
        whole = _html_table(_html_row(heads, heads, "th"), [_html_row(heads, line, "td") for line in texts], "")
        out += f"<details><summary>stages: {len(texts)}</summary>{whole}</details>"
    return out + (f"<p>{escape(note)}</p>" if note else "")


def _html_row(head: Sequence[str], texts: Sequence[str], tag: str) -> str:
    """One line of a table: words to the left, numbers to the right."""
    out = []
    for name, text in zip(head, texts, strict=True):
        css = _CELL + ("left" if name == head[0] or holds_words(name) else "right")
        if name == head[0]:  # names may be long
            css = css.replace("nowrap", "normal;overflow-wrap:anywhere")
        out.append(f'<{tag} style="{css};{_RULE if tag == "th" else ""}">{escape(text)}</{tag}>')
    return f"<tr>{''.join(out)}</tr>"


def _html_table(head: str, lines: Sequence[str], below: str) -> str:
    """A table with a caption below it."""
    note = f'<div style="opacity:.75;margin:.3em 0">{escape(below)}</div>' if below else ""
    whole = f'<table style="border-collapse:collapse"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div style="overflow-x:auto">{whole}{note}</div>'
