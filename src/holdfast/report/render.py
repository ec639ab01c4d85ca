"""The page: results merged by data set, each part's tables and figures computed, and the template filled in."""

from __future__ import annotations

import dataclasses
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ..errors import UserError, plain, unknown
from ..io import write_atomic
from ..results import (
    CheckResult,
    Results,
    Row,
    Run,
    any_certified,
    attack_columns,
    caption_notes,
    cells,
    compare_rows,
    corruption_tables,
    csv,
    has_row,
    heading,
    latex,
    load,
    markdown,
    percent,
    pgd50_verdict_text,
    remaining_text,
    rows,
    seconds_text,
    significance,
    status_text,
)
from ..results.corruptions import CORRUPTIONS
from ..results.rows import WORST_FIRST
from ..results.text import holds_words
from ..user_input import typed
from .captions import captions, captions_text
from .figures import (
    draw_accuracy,
    draw_classes,
    draw_margins,
    draw_stages,
    inline,
    style,
    write_figure,
)
from .merge import merged
from .opening import answers, assumed, facts, page_title
from .panels import draw_confusion, draw_corruptions, draw_eps, draw_features
from .summary import (
    class_name,
    eps_curves,
    finding,
    frequent_confusions,
    per_class,
    proof_table,
    region_parts,
    region_table,
    runs_of,
    stage_totals,
)
from .sweep import draw_sweeps

EXAMPLES, EXAMPLE_BYTES, CLASSES = 6, 3_000_000, 20
WHOLE = 12  # a name of at most this length stays on one line


@typed
def render(
    results_list: Results | str | Path | Sequence[Results | str | Path], path: str | Path, baseline: str = ""
) -> Path:
    """Write one self-contained HTML file. Results of the same data set are shown together.

    Args:
        results_list: one or several Results, or paths to them.
        path: the file, or a folder that gets ``report.html``.
        baseline: the label or the loss of the row that others are tested against; "", and where a data set has no such
            row, the first one.

    Returns:
        The path of the file.

    Raises:
        UserError: there are no runs, a path cannot be read, or the file cannot be written.
    """
    given = [results_list] if isinstance(results_list, Results | str | Path) else list(results_list)
    sources = [r if isinstance(r, Results) else load(r) for r in given]
    parts = [_part(r, f"p{i}-", baseline) for i, r in enumerate(merged(sources)) if r.runs]
    if not parts:
        raise UserError("there are no runs to report. Give results that hold at least one.")
    titles = Counter(part["title"] for part in parts)
    for part in parts:
        part["title"] += f": {part['data']}" if titles[part["title"]] > 1 and part["data"] != part["title"] else ""
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,  # markup of ours is none
    )
    page.filters |= {
        "percent": percent,
        "pgd50_verdict": pgd50_verdict_text,
        "verdict": lambda row: status_text(row.status, row.status_seeds, len(row.runs)),
        "p": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
        "name": breakable,
        "words": holds_words,
        "names": breakable_words,
        "points": lambda v: f"{100 * v:+.1f}".replace("-", "−"),
    }
    html = page.get_template("report.html.j2").render(
        parts=parts, sources=[_source(r) for r in sources],
        script=_script(), ranks={"": -1, **{word: rank for rank, word in enumerate(WORST_FIRST)}})  # fmt: skip
    path = Path(path)
    return write_atomic(path / "report.html" if path.is_dir() or not path.suffix else path, html)


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "accuracy": draw_accuracy, "stages": draw_stages, "margins": draw_margins, "classes": draw_classes,
    "confusion": draw_confusion, "eps": draw_eps, "features": draw_features, "sweep": draw_sweeps,
    "corruptions": draw_corruptions,
}  # fmt: skip


@typed
def figure(results: Results, kind: str = "accuracy") -> Figure | None:
    """One figure of the report, to be shown in a notebook or changed.

    Args:
        results: of one data set.
        kind: "accuracy", "stages", "margins", "classes", "confusion", "eps", "features", "sweep" or "corruptions".

    Returns:
        A matplotlib figure; None where the results do not hold what it shows.

    Raises:
        UserError: another kind.
    """
    if kind not in FIGURES:
        raise unknown("figure", kind, FIGURES)
    with style():
        return FIGURES[kind](results) if results.runs else None


@typed
def figures(results_list: Results | Sequence[Results], dir: str | Path, baseline: str = "") -> list[Path]:
    """Write each figure that the data allow, their captions, and the table as CSV, LaTeX and Markdown.

    Figures are 5.6 inches wide: SVG (text stays text), PNG (300 dpi) and PDF (fonts embedded). captions.md has a
    caption for each that stands alone.

    Args:
        results_list: one or several Results. Those of different data sets get subfolders named after the data.
        dir: the folder.
        baseline: as for ``render``.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    parts = merged([results_list] if isinstance(results_list, Results) else results_list)
    written = []
    for i, part in enumerate(parts):
        name = re.sub(r"\W+", "-", str(part.data.get("name", "data"))).strip("-")
        folder = Path(dir) if len(parts) == 1 else Path(dir) / f"{i + 1}-{name}"
        figures_drawn = {kind: drawn for kind in FIGURES if (drawn := figure(part, kind)) is not None}
        for kind, drawn in figures_drawn.items():
            written += write_figure(drawn, folder, kind)
        if part.runs:
            text = captions_text(part, rows(part), list(figures_drawn))
            written.append(write_atomic(folder / "captions.md", text))
            base = _in(part, baseline)
            texts = {"csv": csv(part, base), "tex": latex(part, base), "md": markdown(part)}
            written += [write_atomic(folder / f"table.{end}", text) for end, text in texts.items()]
    return written


@typed
def latex_tables(results_list: Results | Sequence[Results], baseline: str = "") -> str:
    """The tables of one or several Results in LaTeX, one for each data set.

    Args:
        results_list: one or several Results.
        baseline: as for ``render``.

    Returns:
        The text, as ``results.latex`` writes it.
    """
    parts = merged([results_list] if isinstance(results_list, Results) else results_list)
    return "\n".join(latex(part, _in(part, baseline)) for part in parts if part.runs)


def _in(part: Results, baseline: str) -> str:
    """The baseline where a data set has it, else that of the first row."""
    return baseline if has_row(part, baseline) else ""


def _script() -> dict[str, Markup | str]:
    """The page's script, and its hash for the policy of the page, which allows no other."""
    text = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    return {"text": Markup(text), "hash": "sha256-" + b64encode(sha256(text.encode()).digest()).decode()}


def _part(results: Results, prefix: str, baseline: str) -> dict[str, Any]:
    """What the template shows of one data set; ``prefix`` keeps the ids of its figures apart."""
    shown, base = rows(results), _in(results, baseline)
    classes = per_class(results)
    lowest = sorted(classes.classes, key=lambda one: sum(v or 0 for v in one.robust))[:CLASSES]
    return {
        "title": page_title(results, shown),
        "data": str(results.data.get("name", "")),
        "prefix": prefix,
        "contents": [],
        "answers": answers(results, shown),
        "facts": facts(results, shown),
        "assumed": assumed(results),
        "finding": finding(results),
        "rows": shown,
        "notes": caption_notes(shown),
        "captions": captions(results, shown),
        "certified": any_certified(shown),
        "pgd50": any(row.pgd50 for row in shown),
        "searched": any(row.norm != CORRUPTIONS for row in shown),
        "attacks": cells(shown) if attack_columns(shown) else [],
        "proofs": proof_table(results),
        "corruptions": inline(draw_corruptions, results, prefix + "k"),
        "corruption_tables": corruption_tables(results),
        "accuracy": inline(draw_accuracy, results, prefix + "a"),
        "sweep": inline(draw_sweeps, results, prefix + "v"),
        "stages": inline(draw_stages, results, prefix + "s"),
        "stage_rows": [(row.label, stage_totals(results, row)) for row in shown],
        "margins": inline(draw_margins, results, prefix + "m"),
        "class_labels": classes.rows,
        "classes": lowest if len(classes.classes) > CLASSES else classes.classes,
        "class_count": len(classes.classes),
        "eps": inline(draw_eps, results, prefix + "e"),
        "eps_notes": _eps_notes(results),
        "features": inline(draw_features, results, prefix + "f"),
        "exact": any(run.projection is not None and run.projection.exact for run in results.runs),
        "regions": region_parts(region_table(results)),
        "confusion": inline(draw_confusion, results, prefix + "w"),
        "frequent_confusions": frequent_confusions(results),
        "examples": _examples(results, shown),
        "comparisons": compare_rows(results, base),
        "significance": significance(results, base),
        "texts": [
            ("LaTeX", latex(results, base)),
            ("CSV", csv(results, base)),
            ("Markdown", markdown(results)),
        ],
        "check_sources": list(
            dict.fromkeys((c.name, c.source, c.track_record) for r in results.runs for c in r.checks)
        ),
        "runs": [
            {
                "run": r,
                "accuracies": _accuracies(r),
                "checks": [_check(c) for c in r.checks],
                "remaining": remaining_text(r),
                "measures": _fields(r.measures),
                "proofs": _proofs(r),
                "cost": _fields(r.cost),
                "train": _fields(r.train),
            }
            for r in results.runs
        ],
    }


def breakable(name: str) -> Markup:
    """A name that a narrow column may break between its settings, never inside a number or a short word.

    >>> breakable("isce:s=10+adversarial:steps=5"), breakable("isce:s=100")
    (Markup('isce:<wbr>s=10+<wbr>adversarial:<wbr>steps=5'), Markup('<span class="whole">isce:s=100</span>'))
    """
    name = plain(name)
    if len(name) <= WHOLE:
        return Markup('<span class="whole">{}</span>').format(name)
    parts = re.findall(r"[^-+@,:/ ]*[-+@,:/ ]*", name)
    parts = [piece for part in parts for piece in re.findall(r"(?:\d+|\D){1,40}", part)]
    return Markup("<wbr>").join(map(escape, parts))


def breakable_words(text: str) -> Markup:
    """A sentence that holds names of losses: the long ones are ``breakable``.

    >>> breakable_words("Most robust: isce:s=10+fit:lr=1.")
    Markup('Most robust: isce:<wbr>s=10+<wbr>fit:<wbr>lr=1.')
    """
    words = plain(text).split(" ")
    is_name = re.compile(r"\S[=:@+]\S").search
    return Markup(" ").join(breakable(word) if len(word) > WHOLE and is_name(word) else escape(word) for word in words)


def _eps_notes(results: Results) -> list[tuple[str, str]]:
    """Why curves of accuracy over eps are in doubt: (the rows, the reasons); rows with the same reasons together."""
    labels: dict[str, list[str]] = {}
    for curve in eps_curves(results):
        if curve.notes:
            labels.setdefault("; ".join(curve.notes), []).append(curve.row.label)
    return [(", ".join(names), reasons) for reasons, names in labels.items()]


def _accuracies(run: Run) -> list[tuple[str, str]]:
    """Every accuracy of a run, in percent."""
    attacks = {heading(name): figure for name, figure in run.attacks.items()}
    figures = {"clean": run.clean, **attacks, "certified": run.certified}
    lines = [(name, f"{percent(figure.value)}%") for name, figure in figures.items() if figure is not None]
    lines += [("robust", f"{percent(run.robust.value)}%" if run.robust else "void"), ("interval", run.interval)]
    if run.between is not None:
        lines.append(("neither broken nor proved", f"{run.between:,} of {run.n:,} samples"))
    return lines


def _proofs(run: Run) -> list[tuple[str, str]]:
    """What each method of proof did in a run, and its time."""
    return [
        (
            cost.method,
            f"{cost.proved:,} of {cost.tried:,} proved"
            + (f", {cost.broken:,} broken" if cost.broken else "")
            + (f", time ran out for {cost.out_of_time:,}" if cost.out_of_time else "")
            + f", {seconds_text(cost.seconds)}",
        )
        for cost in run.proofs
    ]


def _examples(results: Results, shown: Sequence[Row]) -> dict[str, Any]:
    """The pictures of each row, as many as the page has room for, and how many were left out."""
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    bytes_left, skipped = EXAMPLE_BYTES, 0
    for row in shown:
        every = [] if row.robust is None else [e for r in runs_of(results, row) for e in r.examples]
        chosen: list[dict[str, Any]] = []
        for e in every:
            pictures = [s.removeprefix("data:image/png;base64,") for s in (e.x_png, e.delta_png, e.x_adv_png)]
            size = sum(map(len, pictures))
            valid = all(re.fullmatch(r"[A-Za-z0-9+/]+=*", s) for s in pictures)
            if len(chosen) == EXAMPLES or size > bytes_left or not valid:
                skipped += 1
                continue
            bytes_left -= size
            clean, adversarial, y = (class_name(results, c) for c in (e.prediction, e.prediction_adv, e.y))
            label = "" if clean == y else f", label {y}"
            chosen.append({"index": e.index, "pictures": pictures, "text": f"{clean} → {adversarial}{label}"})
        if chosen:
            groups.append((row.label, chosen))
    return {"groups": groups, "skipped": skipped}


def _check(check: CheckResult) -> dict[str, str]:
    """A check's line."""
    ran = check.value is not None
    return {
        "name": check.name,
        "status": check.status,
        "why": check.why,
        "claims": ", ".join(heading(claim) for claim in check.claims) or "none",
        "share": f"{100 * check.k / check.n:.1f}%" if ran else "–",
        "threshold": f"{100 * check.threshold:.0f}%" if ran else "–",
    }


def _source(r: Results) -> dict[str, Any]:
    """How to reproduce one results file."""
    return {
        "command": r.command,
        "created": r.created,
        "holdfast": r.holdfast,
        "settings": _flat(r.settings),
        "environment": _flat(r.environment),
        "data": _flat({k: v for k, v in r.data.items() if k not in ("classes", "notes", "title", "labels")}),
        "seeds": ", ".join(dict.fromkeys(str(run.seed) for run in r.runs)),
    }


def _fields(value: Any) -> list[tuple[str, str]]:
    """The fields of a dataclass that are known, as lines; none for None."""
    if value is None:
        return []
    return _flat({name: figure for name, figure in dataclasses.asdict(value).items() if figure is not None})


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: ('fit.epochs', '10')."""
    if isinstance(value, dict):
        return [line for k, v in value.items() for line in _flat(v, f"{name}.{k}" if name else str(k))]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) and name != "seed" else f"{value:.6g}"
    return [(name, text)]
