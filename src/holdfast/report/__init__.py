"""Results made readable: one HTML file that opens anywhere and asks nothing of the network, and its figures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..errors import UserError
from ..io import write_atomic
from ..results import (
    Results,
    Row,
    Run,
    any_proved,
    csv,
    latex,
    load,
    markdown,
    per_attack_table,
    percent,
    remaining_text,
    rows,
    threat_text,
)
from .figures import (
    CERTIFIED,
    CLEAN,
    DEAD_ALL,
    DEAD_TRUE,
    INK,
    LOST,
    MUTED,
    PAPER,
    PGD50,
    ROBUST,
    RULE,
    WIDTH,
    axes,
    draw_accuracy,
    draw_classes,
    draw_margins,
    draw_stages,
    inline,
    percent_axis,
    style,
    write_figure,
)
from .panels import draw_eps, draw_features, draw_mistakes
from .summary import (
    Comparison,
    class_name,
    compare,
    finding,
    measures,
    missed,
    mistakes,
    most_mistaken,
    per_class,
    runs_of,
    stage_totals,
)

__all__ = [
    "CERTIFIED", "CLEAN", "DEAD_ALL", "DEAD_TRUE", "INK", "LOST", "MUTED", "PAPER", "PGD50", "ROBUST", "RULE",
    "WIDTH", "Comparison", "axes", "compare", "draw_eps", "figures", "finding", "identity", "measures", "merged",
    "mistakes", "per_class", "percent_axis", "render", "style", "write_figure",
]  # fmt: skip

EXAMPLES, EXAMPLE_BYTES, CLASSES = 6, 3_000_000, 20


def render(results_list: Results | str | Path | Sequence[Results | str | Path], path: str | Path) -> Path:
    """Writes one self-contained HTML file from results, or paths to them, and returns its path.

    Results of the same data are shown together. ``path`` is a file, or a folder that gets ``report.html``. Raises
    UserError when there is nothing to show or it cannot be written.
    """
    given = [results_list] if isinstance(results_list, Results | str | Path) else list(results_list)
    sources = [r if isinstance(r, Results) else load(r) for r in given]
    parts = [_part(r, f"p{i}-") for i, r in enumerate(merged(sources)) if r.runs]
    if not parts:
        raise UserError("there are no runs to report. Give results that hold at least one.")
    folder = Path(__file__).parent.parent / "templates"
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page.filters |= {
        "percent": percent,
        "p": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
        "points": lambda v: f"{100 * v:+.1f}".replace("-", "−"),
    }
    html = page.get_template("report.html.j2").render(
        parts=parts, sources=[_source(r) for r in sources], dead=(f"{DEAD_TRUE:.1f}", f"{DEAD_ALL:.0f}"))  # fmt: skip
    path = Path(path)
    return write_atomic(path / "report.html" if path.is_dir() or not path.suffix else path, html)


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "accuracy": draw_accuracy, "stages": draw_stages, "margins": draw_margins, "classes": draw_classes,
    "mistakes": draw_mistakes, "eps": draw_eps, "features": draw_features,
}  # fmt: skip
TABLES = {"csv": csv, "tex": latex, "md": markdown}


def figures(results_list: Results | Sequence[Results], dir: str | Path) -> list[Path]:
    """Writes each figure the data allow as SVG (text stays text) and PNG, and the table as CSV, LaTeX and Markdown,
    into ``dir``; returns the paths. Results of different data go into folders of their own, named after the data."""
    parts = merged([results_list] if isinstance(results_list, Results) else results_list)
    written = []
    for i, part in enumerate(parts):
        name = re.sub(r"\W+", "-", str(part.data.get("name", "data"))).strip("-")
        folder = Path(dir) if len(parts) == 1 else Path(dir) / f"{i + 1}-{name}"
        for kind, draw in FIGURES.items():
            with style():
                figure = draw(part) if part.runs else None
            if figure is not None:
                written += write_figure(figure, folder, kind)
        if part.runs:
            written += [write_atomic(folder / f"table.{end}", text(part)) for end, text in TABLES.items()]
    return written


def identity(results: Results) -> str:
    """What makes the data of two results the same."""
    return repr([results.data.get(key) for key in ("name", "fingerprint", "classes")])


def merged(sources: Sequence[Results]) -> list[Results]:
    """One Results per data set; a run given twice counts once."""
    groups: dict[str, Results] = {}
    for r in sources:
        key = identity(r)
        have = groups.get(key)
        new = r.runs if have is None else (*have.runs, *(run for run in r.runs if run not in have.runs))
        groups[key] = dataclasses.replace(have or r, runs=new)
    return list(groups.values())


def _part(results: Results, prefix: str) -> dict[str, Any]:
    shown, data = rows(results), results.data
    shape = data.get("shape")
    seeds = list(dict.fromkeys(str(r.seed) for r in results.runs if r.seed is not None))
    samples = " or ".join(f"{n:,}" for n in dict.fromkeys(r.n for r in results.runs))
    labels, cells = per_class(results)
    hardest = sorted(cells, key=lambda c: sum(v or 0 for v in c[2]))[:CLASSES] if len(cells) > CLASSES else cells
    facts = [
        ("data", str(data.get("name", "not recorded"))),
        ("samples", samples + (f", {' × '.join(map(str, shape))}" if isinstance(shape, list | tuple) else "")),
        ("classes", str(len(names)) if isinstance(names := data.get("classes"), list) else ""),
        ("threat", ", ".join(dict.fromkeys(threat_text(r.threat) for r in results.runs))),
        ("losses", ", ".join(dict.fromkeys(r.loss for r in results.runs))),
        ("seeds", ", ".join(seeds)),
        ("intervals", "; ".join(dict.fromkeys(r.interval for r in shown))),
        ("cost of the evaluation", _cost(results)),
    ]
    return {
        "prefix": prefix,
        "title": facts[0][1],
        "facts": [(k, v) for k, v in facts if v],
        "finding": finding(results),
        "rows": shown,
        "certified": any_proved(shown),
        "protocols": per_attack_table(shown) if any(row.individual for row in shown) else [],
        "accuracy": inline(draw_accuracy, results, prefix + "a"),
        "stages": inline(draw_stages, results, prefix + "s"),
        "stage_rows": [(row.label, stage_totals(results, row)) for row in shown],
        "margins": inline(draw_margins, results, prefix + "m"),
        "class_labels": labels,
        "classes": hardest,
        "class_count": len(cells),
        "eps": inline(draw_eps, results, prefix + "e"),
        "features": inline(draw_features, results, prefix + "f"),
        "exact": any(run.picture.get("exact") for run in results.runs),
        "region": measures(results),
        "missed": missed(results),
        "mistakes": inline(draw_mistakes, results, prefix + "w"),
        "most_mistaken": most_mistaken(results),
        "examples": _examples(results, shown),
        "comparisons": compare(results),
        "runs": [
            {
                "run": r,
                "accuracies": _accuracies(r),
                "checks": [_check(c) for c in r.checks],
                "remaining": remaining_text(r),
                "measures": _flat(r.measures),
                "cost": _flat(r.cost),
                "train": _flat(r.train),
            }
            for r in results.runs
        ],
    }


def _cost(results: Results) -> str:
    """Passes and time of all evaluations together; empty where none was recorded."""
    costs = [run.cost for run in results.runs if {"forwards", "backwards", "seconds"} <= run.cost.keys()]
    if not costs:
        return ""
    passes = sum(cost["forwards"] + cost["backwards"] for cost in costs)
    seconds = sum(cost["seconds"] for cost in costs)
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{passes / 1e6:.1f} million passes, {time}" if passes >= 1e5 else f"{passes:,} passes, {time}"


def _accuracies(run: Run) -> list[tuple[str, str]]:
    """Every accuracy of a run, in percent."""
    alone = {name: figure for name, figure in run.individual.items() if name != "pgd50"}
    figures = {"clean": run.clean, "pgd50": run.pgd50, "own loss": run.own, **alone, "certified": run.certified}
    shown = [(name, f"{percent(figure.value)}%") for name, figure in figures.items() if figure is not None]
    return [*shown, ("robust", f"{percent(run.robust.value)}%" if run.robust else "void"), ("interval", run.interval)]


def _examples(results: Results, shown: Sequence[Row]) -> dict[str, Any]:
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    left, skipped = EXAMPLE_BYTES, 0
    for row in shown:
        every = [] if row.robust is None else [e for r in runs_of(results, row) for e in r.examples]
        kept: list[dict[str, Any]] = []
        for e in every:
            pictures = [s.removeprefix("data:image/png;base64,") for s in (e.x_png, e.delta_png, e.x_adv_png)]
            size = sum(map(len, pictures))
            if len(kept) == EXAMPLES or size > left or not all(re.fullmatch(r"[A-Za-z0-9+/]+=*", s) for s in pictures):
                skipped += 1
                continue
            left -= size
            was, becomes, y = (class_name(results, c) for c in (e.prediction, e.prediction_adv, e.y))
            label = "" if was == y else f", labelled {y}"
            kept.append({"index": e.index, "pictures": pictures, "text": f"was {was}, becomes {becomes}{label}"})
        if kept:
            groups.append((row.label, kept))
    return {"groups": groups, "skipped": skipped}


def _check(check: Any) -> dict[str, str]:
    """A check's line, whatever of it there is."""
    found = check if isinstance(check, dict) else {"name": check}
    line = {key: str(found.get(key) or "") for key in ("name", "status", "why", "source", "track_record")}
    line["claims"] = ", ".join(map(str, found.get("claims") or []))
    ran = found.get("value") is not None
    line["share"] = f"{100 * found['value']:.1f}%" if ran else "–"
    line["threshold"] = f"{100 * found['threshold']:.0f}%" if ran else "–"
    return line


def _source(r: Results) -> dict[str, Any]:
    return {
        "command": r.command,
        "created": r.created,
        "holdfast": r.holdfast,
        "settings": _flat(r.settings),
        "environment": _flat(r.environment),
        "data": _flat({k: v for k, v in r.data.items() if k != "classes"}),
        "seeds": ", ".join(dict.fromkeys(str(run.seed) for run in r.runs)),
    }


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: ('fit.epochs', '10')."""
    if isinstance(value, dict):
        return [line for k, v in value.items() for line in _flat(v, f"{name}.{k}" if name else str(k))]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) and name != "seed" else f"{value:.6g}"
    return [(name, text)]
