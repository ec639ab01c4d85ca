"""The table of results as Markdown, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from csv import writer as csv_writer
from io import StringIO

from ..user_input import typed
from .rows import Row, name_text, rows
from .schema import Results, total_proofs
from .text import any_certified, cells, other_attacks


@typed
def markdown(results: Results) -> str:
    """The table in Markdown.

    Args:
        results: the results.

    Returns:
        The text, special characters escaped.
    """
    head, *texts = cells(rows(results))
    rules = ["---" if name in ("loss", "verdict") else "---:" for name in head]
    lines = ["| " + " | ".join(map(_plain, head)) + " |", "|" + "|".join(rules) + "|"]
    for label, *rest in texts:
        lines.append("| " + " | ".join([_plain(label), *rest]) + " |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_<>\[\]|&~$#])", r"\\\1", text)


@typed
def csv(results: Results) -> str:
    """The rows as CSV: proportions unrounded, empty where there is no value.

    Args:
        results: the results.

    Returns:
        The text. Columns: loss, threat; clean, pgd50, the other attacks, certified (where a sample is) and robust,
        each with ``_low`` and ``_high``; pgd50_verdict, verdict, n, seeds, interval. Where PGD-50 was run on a sample,
        pgd50_n. Where a sample is certified also,
        counted over all seeds: between (samples that are neither broken nor proved), proved_METHOD for each method that
        proved one, and proof_seconds. A name that a spreadsheet would take for a formula begins with an apostrophe.
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
    write(["loss", "threat", *bounds, "pgd50_verdict", "verdict", "n", "seeds", "interval", *sampled, *proofs])
    for r in shown:
        every = r.clean, *map(r.attacks.get, names), *([r.certified] if certified else []), r.robust
        figures = [v for i in every for v in (dataclasses.astuple(i) if i else ("", "", ""))]
        words = r.pgd50_verdict, r.verdict, r.n, " ".join(map(str, r.seeds)), r.interval
        asked = [r.n if r.pgd50_n is None else r.pgd50_n] * len(sampled)
        write([r.label, r.threat, *figures, *words, *asked, *(_proofs(r, methods) if certified else ())])
    return out.getvalue()


def _proofs(row: Row, methods: Sequence[str]) -> list[object]:
    """What lies between, what each method proved, and the seconds of all proofs; empty where it is not known."""
    proved = {cost.method: cost.proved for cost in row.proofs}
    counts = [proved.get(method, 0) if row.proofs else "" for method in methods]
    seconds = sum(cost.seconds for cost in row.proofs)
    return ["" if row.between is None else row.between, *counts, round(seconds, 3) if row.proofs else ""]


def _no_formula(text: str) -> str:
    """A text cell that no spreadsheet computes: one that begins like a formula gets an apostrophe before it."""
    text = name_text(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(ch, ch) for ch in text)


@typed
def latex(results: Results) -> str:
    """The table as a LaTeX tabular.

    Args:
        results: the results.

    Returns:
        The text, special characters escaped.
    """
    head, *texts = cells(rows(results))
    columns = "".join("l" if name in ("loss", "verdict") else "r" for name in head)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", " & ".join(map(_tex, head)) + r" \\", r"\hline"]
    at = next(i for i, name in enumerate(head) if name.startswith("robust"))
    for text in texts:
        line = [_tex(c) for c in text]
        line[at] = line[at].replace(r"\textless{}=", r"$\leq$").replace("[", "{[}").replace("]", "{]}")
        lines.append(" & ".join(line) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
