"""The table of results as Markdown, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from csv import writer as csv_writer
from io import StringIO

from ..user_input import typed
from .differences import RowDifference, compare_rows, p_text, points_text
from .rows import Row, name_text, rows
from .schema import Results, total_proofs
from .text import any_certified, caption, cells, holds_words, other_attacks


@typed
def markdown(results: Results) -> str:
    """The table in Markdown.

    Args:
        results: the results.

    Returns:
        The text, special characters escaped.
    """
    head, *texts = cells(rows(results))
    rules = ["---" if holds_words(name) else "---:" for name in head]
    lines = ["| " + " | ".join(map(_plain, head)) + " |", "|" + "|".join(rules) + "|"]
    for label, *rest in texts:
        lines.append("| " + " | ".join([_plain(label), *rest]) + " |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_<>\[\]|&~$#])", r"\\\1", text)


@typed
def csv(results: Results, baseline: str = "") -> str:
    """The rows as CSV: proportions unrounded, empty where there is no value.

    Args:
        results: the results.
        baseline: what rows are tested against, as for ``compare_rows``.

    Returns:
        The text. Columns: loss, threat; clean, pgd50, the other attacks, certified (where a sample is) and robust,
        each with ``_low`` and ``_high``; pgd50_verdict, verdict, n, seeds, interval. Where PGD-50 was run on a sample,
        pgd50_n. Where a sample is certified also,
        counted over all seeds: between (samples that are neither broken nor proved), proved_METHOD for each method that
        proved one, and proof_seconds. Where rows are compared, at the end: against, difference (of robust accuracy)
        with ``_low`` and ``_high``, p, p_holm and test. A name that a spreadsheet would take for a formula begins with
        an apostrophe.
    """
    out = StringIO()
    writer = csv_writer(out, lineterminator="\n")

    def write(line: Sequence[object]) -> None:
        writer.writerow([_no_formula(cell) if isinstance(cell, str) else cell for cell in line])

    shown = rows(results)
    names = ["pgd50", *other_attacks(shown)]
    certified = ["certified"] * any_certified(shown)  # the columns of every other table
    bounds = [f"{c}{suffix}" for c in ("clean", *names, *certified, "robust") for suffix in ("", "_low", "_high")]
    methods = [cost.method for cost in total_proofs([cost for r in shown for cost in r.proofs]) if cost.proved]
    proofs = ["between", *(f"proved_{method}" for method in methods), "proof_seconds"] if certified else []
    sampled = ["pgd50_n"] * any(r.pgd50_n is not None for r in shown)
    compared = {one.label: one for one in compare_rows(results, baseline)}
    tests = ["against", "difference", "difference_low", "difference_high", "p", "p_holm", "test"] if compared else []
    about = ["pgd50_verdict", "verdict", "n", "seeds", "interval"]
    write(["loss", "threat", *bounds, *about, *sampled, *proofs, *tests])
    for r in shown:
        every = r.clean, *map(r.attacks.get, names), *([r.certified] if certified else []), r.robust
        figures = [v for i in every for v in (dataclasses.astuple(i) if i else ("", "", ""))]
        words = r.pgd50_verdict, r.verdict, r.n, " ".join(map(str, r.seeds)), r.interval
        test = _test(compared.get(r.label)) if compared else ()
        asked = [r.n if r.pgd50_n is None else r.pgd50_n] * len(sampled)
        write([r.label, r.threat, *figures, *words, *asked, *(_proofs(r, methods) if certified else ()), *test])
    return out.getvalue()


def _proofs(row: Row, methods: Sequence[str]) -> list[object]:
    """What lies between, what each method proved, and the seconds of all proofs; empty where it is not known."""
    proved = {cost.method: cost.proved for cost in row.proofs}
    counts = [proved.get(method, 0) if row.proofs else "" for method in methods]
    seconds = sum(cost.seconds for cost in row.proofs)
    return ["" if row.between is None else row.between, *counts, round(seconds, 3) if row.proofs else ""]


def _test(one: RowDifference | None) -> list[object]:
    """A row's comparison with the baseline; empty for the baseline itself."""
    if one is None:
        return [""] * 7
    figures = ("" if v is None else v for v in (one.difference, one.low, one.high, one.p, one.p_holm))
    return [one.against, *figures, one.test]


def _no_formula(text: str) -> str:
    """A text cell that no spreadsheet computes: one that begins like a formula gets an apostrophe before it."""
    text = name_text(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}",
        **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(ch, ch) for ch in text)


@typed
def latex(results: Results, baseline: str = "") -> str:
    """The table in LaTeX, with rules of the package booktabs, a caption and a label.

    Args:
        results: the results.
        baseline: what rows are tested against, as for ``compare_rows``.

    Returns:
        The text, special characters escaped. Where rows are compared it has two columns more: the difference in robust
        accuracy to the baseline, in points, with its 95% interval over paired seeds; and the Holm-adjusted p-value.
    """
    shown = rows(results)
    head, *texts = cells(shown)
    compared = {one.label: one for one in compare_rows(results, baseline) if one.difference is not None}
    columns = "".join("l" if holds_words(name) else "r" for name in head) + "rr" * bool(compared)
    names = [*map(_tex, head), *(["difference", "$p$, Holm"] if compared else [])]
    name = re.sub(r"\W+", "-", f"{results.data.get('name', '')} {' '.join(dict.fromkeys(r.threat for r in shown))}")
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(caption(results, shown))}{_tested(list(compared.values()))}.}}",
        rf"\label{{tab:{name.strip('-').lower()}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(names) + r" \\",
        r"\midrule",
    ]
    for row, text in zip(shown, texts, strict=True):
        line = [_tex(c).replace(r"\textless{}=", r"$\leq$") for c in text]
        line += _tex_test(compared.get(row.label)) if compared else []
        lines.append(" & ".join(line) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _tested(compared: Sequence[RowDifference]) -> str:
    """The end of the caption: what the differences are, and by which tests; "" without any."""
    if not compared:
        return ""
    against = " or ".join(dict.fromkeys(_tex(one.against) for one in compared))
    kinds = {one.seeds: "McNemar's test of two networks" if one.seeds is None else f"paired $t$ over {one.seeds} seeds"
             for one in compared}  # fmt: skip
    return f"; difference in robust accuracy to {against}, in points: {', '.join(kinds.values())}"


def _tex_test(one: RowDifference | None) -> list[str]:
    """A row's difference and p-value; dashes for the baseline and for rows that were not compared."""
    if one is None or one.difference is None or one.p_holm is None:
        return ["--", "--"]
    interval = "" if one.low is None or one.high is None else f" [{points_text(one.low)}, {points_text(one.high)}]"
    difference = f"${100 * one.difference:+.1f}$" + _tex(interval).replace("-", "$-$")
    return [difference, f"${p_text(one.p_holm).removeprefix('= ')}$"]
