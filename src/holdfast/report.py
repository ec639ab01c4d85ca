"""Results made readable: one HTML file that opens anywhere and asks nothing of the network, and its figures."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from holdfast.errors import UserError
from holdfast.results import (
    Results,
    Row,
    Run,
    holm,
    load,
    mcnemar,
    paired_t,
    percent,
    remainder_text,
    rows,
    threat_text,
    write_atomic,
)

# Colours that stay apart for colour-blind eyes (Okabe and Ito). In HTML each becomes a CSS variable, for dark mode.
INK, MUTED, RULE, PAPER = "#1b1f24", "#5b6570", "#d9dee3", "#fefefe"
CLEAN, PUBLISHED, ROBUST, LOST = "#6b7684", "#d98200", "#0072b2", "#f0b27a"
_VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", CLEAN: "clean", PUBLISHED: "published", ROBUST: "robust",
}  # fmt: skip
# float32 keeps 24 bits: 1 - p rounds to 0 for the true logit beyond 24 log 2; exp itself is 0 beyond 150 log 2.
DEAD_TRUE, DEAD_ALL = 24 * math.log(2), 150 * math.log(2)
WIDTH, EXAMPLES, EXAMPLE_BYTES, CLASSES = 5.6, 6, 3_000_000, 20


def finding(results: Results) -> str:
    """The main finding in one sentence or two: the figure that exceeds the truth most, and the most robust loss."""
    found = [(r, r.robust) for r in rows(results) if r.robust is not None]
    if not found:
        return "No robust figure stands: every measurement is void."
    worst, robust = max(found, key=lambda f: f[0].published.value - f[1].value)
    said = ["No published figure exceeds what stronger attacks left standing."]
    published, true = percent(worst.published.value), percent(robust.value)
    if worst.published.value > robust.value and published != true:
        said = [f"{worst.label}: published {published}% but at most {true}% is true."]
    threats = list(dict.fromkeys(row.threat for row, _ in found))
    for threat in threats if len(found) > 1 else ():  # figures under different threats are not compared
        here = [f for f in found if f[0].threat == threat]
        best = max((r for _, r in here), key=lambda r: r.value)
        names = " and ".join(row.label for row, r in here if r.value == best.value)
        where = f" under {threat}" if len(threats) > 1 else ""
        interval = f"95% interval {percent(best.low)} to {percent(best.high)}"
        said.append(f"Most robust{where}: {names}, at most {percent(best.value)}% ({interval}).")
    return " ".join(said)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the first of its threat, in robust accuracy; figures are None where ``test`` says why not."""

    label: str
    against: str
    test: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


def compare(results: Results) -> list[Comparison]:
    """Each row against the first of its threat: on the same samples (one run each), or on the seeds both have.

    McNemar needs equal sample indexes and labels; the t test two or more seeds. All are adjusted together (Holm).
    """
    first: dict[str, Row] = {}
    pairs = [(row, first.setdefault(row.threat, row)) for row in rows(results)]
    out = [_compare(results, row, base) for row, base in pairs if row is not base]
    adjusted = iter(holm([c.p for c in out if c.p is not None]))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in out]


def _compare(results: Results, row: Row, base: Row) -> Comparison:
    if row.robust is None or base.robust is None:
        return Comparison(row.label, base.label, "not compared: one of the two is void")
    ours, theirs = _runs(results, row), _runs(results, base)
    if len(ours) == len(theirs) == 1:
        a, b = ours[0].samples, theirs[0].samples
        if a is None or b is None or not len(a) or (a.index, a.y) != (b.index, b.y):
            return Comparison(row.label, base.label, "not compared: not measured on the same samples")
        won = sum(p > q for p, q in zip(a.robust, b.robust, strict=True))
        lost = sum(p < q for p, q in zip(a.robust, b.robust, strict=True))
        test = f"exact McNemar; holds alone on {won:,} samples, the first on {lost:,}"
        return Comparison(row.label, base.label, test, (won - lost) / len(a), p=mcnemar(a.robust, b.robust))
    by_seed = [{r.seed: r.robust.value for r in side if r.robust is not None} for side in (ours, theirs)]
    seeds = [s for s in by_seed[0] if s in by_seed[1]]
    if len(seeds) < 2:
        return Comparison(row.label, base.label, "not compared: fewer than two seeds in common")
    t = paired_t(*([side[s] for s in seeds] for side in by_seed))
    few = "; fewer than the 8 a claim needs" if t.n < 8 else ""
    return Comparison(row.label, base.label, f"paired t over {t.n} seeds{few}", t.difference, t.low, t.high, t.p)


def per_class(results: Results) -> tuple[list[str], list[tuple[str, int, list[float | None]]]]:
    """Robust accuracy per class: the labels of the rows that have it, and (class name, samples, one figure per row)."""
    shown = [
        (row.label, [r.samples for r in _runs(results, row) if r.samples is not None])
        for row in rows(results)
        if row.robust is not None
    ]
    shown = [(label, samples) for label, samples in shown if samples]
    held: dict[int, list[list[int]]] = {}
    for j, (_, samples) in enumerate(shown):
        for y, right in ((y, right) for s in samples for y, right in zip(s.y, s.robust, strict=True)):
            held.setdefault(y, [[] for _ in shown])[j].append(right)
    return [label for label, _ in shown], [
        (_class(results, y), max(map(len, cells)), [sum(c) / len(c) if c else None for c in cells])
        for y, cells in sorted(held.items())
    ]


def _runs(results: Results, row: Row) -> list[Run]:
    return [results.runs[i] for i in row.runs]


def _class(results: Results, y: int) -> str:
    names = results.data.get("classes")
    return str(names[y]) if isinstance(names, list) and 0 <= y < len(names) else str(y)


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure."""
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "holdfast", "text.parse_math": False, "font.family": "sans-serif",
        "font.size": 8, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK,
        "axes.edgecolor": RULE, "axes.linewidth": 0.8, "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser brings its own fonts
        yield


def axes(lines: int, each: float, top: float) -> tuple[Figure, Axes]:
    """One band per row, its label above it: long names fit a phone."""
    height = lines * each + top + 0.45
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0.12 / WIDTH, 0.4 / height, 1 - 0.3 / WIDTH, lines * each / height))
    ax.set_ylim(lines, 0)
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.tick_params(axis="x", length=3, width=0.8)
    return figure, ax


def percent_axis(ax: Axes, what: str, most: float = 100) -> None:
    """An axis from 0 to 100%, with room for words up to ``most``."""
    ax.set_xlim(0, most)
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel(what)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color=RULE, linewidth=0.6)


def _short(text: str, most: int = 44) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _accuracy(results: Results) -> Figure | None:
    shown = rows(results)
    figure, ax = axes(len(shown), 0.46, 0.3)
    looks = (("clean", CLEAN, "o", "none"), ("published", PUBLISHED, "D", PUBLISHED), ("robust", ROBUST, "o", ROBUST))
    for i, row in enumerate(shown):
        at = i + 0.68
        ax.text(0, i + 0.34, _short(row.label), va="center", fontweight="bold")
        if row.robust is not None:
            ax.plot([100 * row.robust.value, 100 * row.published.value], [at, at], color=RULE, linewidth=4, zorder=1.5)
        for (name, colour, marker, face), value in zip(looks, (row.clean, row.published, row.robust), strict=True):
            if value is None:
                ax.text(0.5, at, "robust: void", va="center", color=MUTED, style="italic")
                continue
            ax.plot([100 * value.low, 100 * value.high], [at, at], color=colour, linewidth=1.4, zorder=2)
            ax.plot([100 * value.value], [at], marker, color=colour, markerfacecolor=PAPER if face == "none" else face,
                    markersize=5.5, linestyle="none", zorder=3, label=name if i == 0 else None)  # fmt: skip
    percent_axis(ax, "accuracy, %")
    handles = [Line2D([], [], color=c, marker=m, linewidth=1.4, markersize=5, label=n,
                                markerfacecolor=PAPER if f == "none" else f) for n, c, m, f in looks]  # fmt: skip
    _legend(ax, handles, 3)
    return figure


def _legend(ax: Axes, handles: Sequence[Any], columns: int) -> None:
    ax.legend(handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False,
              borderpad=0, handlelength=1.6, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip


def _stage_totals(results: Results, row: Row) -> dict[str, list[float]]:
    """attacked, broken, passes and seconds by stage name, summed over the row's runs."""
    out: dict[str, list[float]] = {}
    for run in _runs(results, row):
        for s in run.stages:
            total = out.setdefault(s.name, [0, 0, 0, 0])
            for k, v in enumerate((s.attacked, s.broken, s.forwards + s.backwards, s.seconds)):
                total[k] += v
    return out


def _stages(results: Results) -> Figure | None:
    shown = [(row, _stage_totals(results, row)) for row in rows(results) if row.robust is not None]
    shown = [(row, totals) for row, totals in shown if totals]
    if not shown:
        return None
    names = list(dict.fromkeys(name for _, totals in shown for name, total in totals.items() if total[1]))
    ramp = mpl.colormaps["YlOrRd"](np.linspace(0.25, 0.95, max(2, len(names))))
    colours = {"wrong already": CLEAN, **{n: to_hex(c) for n, c in zip(names, ramp, strict=False)}, "holds": ROBUST}
    figure, ax = axes(len(shown), 0.5, 0.1 + 0.17 * math.ceil((len(names) + 2) / 3))
    for i, (row, totals) in enumerate(shown):
        n = row.n * len(row.runs)
        wrong = round((1 - row.clean.value) * n)
        parts = {"wrong already": wrong, **{k: t[1] for k, t in totals.items() if t[1]}}
        parts["holds"] = max(0, n - sum(parts.values()))
        ax.text(0, i + 0.3, _short(row.label, 34), va="center", fontweight="bold")
        cost = f"{sum(t[2] for t in totals.values()) / n:,.0f} passes per sample"
        ax.text(100, i + 0.3, cost, va="center", ha="right", color=MUTED)
        left = 0.0
        for name, count in parts.items():
            share = 100 * count / n
            ax.barh(i + 0.7, share, 0.42, left=left, color=colours[name], edgecolor=PAPER, linewidth=0.8)
            if share >= 6:
                light = np.dot((0.3, 0.59, 0.11), to_rgb(colours[name])) > 0.55
                ink = "#111111" if light else "#ffffff"
                ax.text(left + share / 2, i + 0.71, f"{share:.0f}", ha="center", va="center", color=ink)
            left += share
    percent_axis(ax, "samples, %")
    _legend(ax, [Patch(color=c, label=_short(n, 24)) for n, c in colours.items()], 3)
    return figure


def _log(m: Any) -> Any:
    """Linear between -1 and 1, logarithmic beyond: margins are signed and span decades."""
    size = np.abs(m)
    return np.sign(m) * np.where(size <= 1, size, 1 + np.log10(np.maximum(size, 1)))


def _margins(results: Results) -> Figure | None:
    columns = []
    for row in rows(results):
        every = [v for r in _runs(results, row) if r.samples is not None for v in r.samples.margin]
        if found := [v for v in every if v is not None]:
            columns.append((row, np.array(found), len(every) - len(found)))
    if not columns:
        return None
    low = min(-1.0, *(c[1].min() for c in columns))
    high = max(2 * DEAD_ALL, *(c[1].max() for c in columns))
    edges = np.linspace(_log(low), _log(high), 81)
    figure, ax = axes(len(columns), 0.62, 0.2)
    for i, (row, margins, missing) in enumerate(columns):
        heights, _ = np.histogram(_log(margins), edges)
        base, scale = i + 1.0, 0.62 / max(1, heights.max())
        ax.stairs(base - heights * scale, edges, baseline=base, fill=True, color=ROBUST, alpha=0.75, linewidth=0)
        ax.axhline(base, color=RULE, linewidth=0.8)
        some, all_lost = (percent((margins > dead).mean()) for dead in (DEAD_TRUE, DEAD_ALL))
        lost = f", {missing:,} without a finite margin" if missing else ""
        beyond = f"{some}% beyond {DEAD_TRUE:.1f}, {all_lost}% beyond {DEAD_ALL:.0f}{lost}"
        ax.text(edges[0], i + 0.2, _short(row.label, 36), va="center", fontweight="bold")
        ax.text(edges[0], i + 0.45, beyond, va="center", color=MUTED, fontsize=7)
    for dead in (DEAD_TRUE, DEAD_ALL):
        ax.axvline(_log(dead), color=PUBLISHED, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        name = f"{dead:.1f}" if dead < 100 else f"{dead:.0f}"
        ax.text(_log(dead), -0.06, name, ha="center", va="bottom", color=PUBLISHED)
    ticks = [0, *(s * 10.0**k for k in range(12) for s in (-1, 1))]
    ticks = sorted(t for t in ticks if low <= t <= high)
    ax.set_xticks([float(_log(t)) for t in ticks], [f"{t:g}".replace("-", "−") for t in ticks])
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("clean margin (logit of the true class less the best other), log scale beyond ±1")
    return figure


def _classes(results: Results) -> Figure | None:
    labels, cells = per_class(results)
    if not cells:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(cells)), layout="constrained")
    ax = figure.add_subplot()
    grid = np.array([[np.nan if v is None else 100 * v for v in values] for _, _, values in cells])
    mesh = ax.pcolormesh(grid, cmap="Blues", vmin=0, vmax=100, edgecolors=PAPER, linewidth=1)
    ax.set_xticks(
        [j + 0.5 for j in range(len(labels))], [_short(label, 16) for label in labels], rotation=30, ha="right"
    )
    ax.set_yticks([i + 0.5 for i in range(len(cells))], [_short(name, 24) for name, _, _ in cells])
    ax.invert_yaxis()
    figure.colorbar(mesh, label="robust accuracy, %")
    return figure


_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "accuracy": _accuracy, "stages": _stages, "margins": _margins, "classes": _classes}  # fmt: skip


def figures(results: Results, dir: str | Path) -> list[Path]:
    """Writes each figure the data allow as SVG (text stays text) and PNG into ``dir``; returns the paths."""
    written = []
    for name, draw in _FIGURES.items():
        with style():
            figure = draw(results) if results.runs else None
        if figure is not None:
            written += write_figure(figure, dir, name)
    return written


def write_figure(figure: Figure, dir: str | Path, name: str) -> list[Path]:
    """Writes ``name.svg`` and ``name.png`` into ``dir``, and returns the paths."""
    written = []
    with style():
        for form in ("svg", "png"):
            buffer = BytesIO()
            meta = {"Date": None} if form == "svg" else {"Software": None}
            figure.savefig(buffer, format=form, dpi=200, facecolor="white", metadata=meta)
            written.append(write_atomic(Path(dir) / f"{name}.{form}", buffer.getvalue()))
    return written


def _inline(draw: Callable[[Results], Figure | None], results: Results, prefix: str) -> Markup | None:
    """The figure as SVG that belongs in HTML: no header, no namespace, its own ids, colours from the page."""
    with style():
        figure = draw(results)
        if figure is None:
            return None
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    extra = r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>"
    svg = re.sub(extra, "", svg[svg.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view[1] if view else ""}" aria-hidden="true">', svg, count=1)

    def adapt(tag: re.Match[str]) -> str:
        own = re.sub(r'\bid="', f'id="{prefix}', tag[0]).replace("url(#", f"url(#{prefix}")
        own = own.replace('xlink:href="#', f'href="#{prefix}')
        own = re.sub(r"(font: [^;\"']*?\d+(?:\.\d+)?px) [^;\"]*", r"\1 system-ui, sans-serif", own)
        for colour, variable in _VARIABLES.items():
            own = own.replace(f": {colour}", f": var(--{variable})")
        return own

    return Markup(re.sub(r"<[^>]+>", adapt, svg))


def render(results_list: Results | str | Path | Sequence[Results | str | Path], path: str | Path) -> Path:
    """Writes one self-contained HTML file from results, or paths to them, and returns its path.

    Results of the same data are shown together. ``path`` is a file, or a folder that gets ``report.html``. Raises
    UserError when there is nothing to show or it cannot be written.
    """
    given = [results_list] if isinstance(results_list, Results | str | Path) else list(results_list)
    sources = [r if isinstance(r, Results) else load(r) for r in given]
    parts = [_part(r, f"p{i}-") for i, r in enumerate(_merged(sources)) if r.runs]
    if not parts:
        raise UserError("there are no runs to report. Give results that hold at least one.")
    folder = Path(__file__).parent / "templates"
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


def _merged(sources: Sequence[Results]) -> list[Results]:
    """One Results per data set; a run given twice counts once."""
    groups: dict[str, Results] = {}
    for r in sources:
        key = repr([r.data.get(k) for k in ("name", "fingerprint", "classes")])
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
    ]
    return {
        "prefix": prefix,
        "title": facts[0][1],
        "facts": [(k, v) for k, v in facts if v],
        "finding": finding(results),
        "rows": shown,
        "accuracy": _inline(_accuracy, results, prefix + "a"),
        "stages": _inline(_stages, results, prefix + "s"),
        "stage_rows": [(row.label, _stage_totals(results, row)) for row in shown],
        "margins": _inline(_margins, results, prefix + "m"),
        "class_labels": labels,
        "classes": hardest,
        "class_count": len(cells),
        "examples": _examples(results, shown),
        "comparisons": compare(results),
        "runs": [
            {
                "run": r,
                "checks": [_check(c) for c in r.checks],
                "remainder": remainder_text(r),
                "measures": _flat(r.measures),
                "cost": _flat(r.cost),
                "train": _flat(r.train),
            }
            for r in results.runs
        ],
    }


def _examples(results: Results, shown: Sequence[Row]) -> dict[str, Any]:
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    left, skipped = EXAMPLE_BYTES, 0
    for row in shown:
        every = [] if row.robust is None else [e for r in _runs(results, row) for e in r.examples]
        kept: list[dict[str, Any]] = []
        for e in every:
            pictures = [s.removeprefix("data:image/png;base64,") for s in (e.x_png, e.delta_png, e.x_adv_png)]
            size = sum(map(len, pictures))
            if len(kept) == EXAMPLES or size > left or not all(re.fullmatch(r"[A-Za-z0-9+/]+=*", s) for s in pictures):
                skipped += 1
                continue
            left -= size
            was, becomes, y = (_class(results, c) for c in (e.prediction, e.prediction_adv, e.y))
            label = "" if was == y else f", labelled {y}"
            kept.append({"index": e.index, "pictures": pictures, "text": f"was {was}, becomes {becomes}{label}"})
        if kept:
            groups.append((row.label, kept))
    return {"groups": groups, "skipped": skipped}


def _check(check: Any) -> dict[str, str]:
    """A check's line, whatever of it there is."""
    found = check if isinstance(check, dict) else {"name": check}
    line = {key: str(found.get(key) or "") for key in ("name", "status", "why", "source", "record")}
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
