"""What an evaluation found, as pure data: intervals, paired tests, JSON and tables. No tensors below this line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from csv import writer as csv_writer
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from holdfast.errors import UserError

SCHEMA = 1
FILE = "results.json"
CLOPPER_PEARSON = "95% Clopper-Pearson interval over samples"
_WORST_FIRST = ("void", "refuted", "loose", "tight")


@dataclass(frozen=True)
class Interval:
    """A proportion in [0, 1] and its interval, ``0 <= low <= value <= high <= 1``. Raises UserError otherwise."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= 1:
            raise UserError(
                f"an Interval is 0 <= low <= value <= high <= 1, got {self.low}, {self.value}, {self.high}."
            )


@dataclass(frozen=True)
class Verdict:
    """What a claim is worth: ``status`` is tight, loose, refuted or void; ``why`` is one phrase."""

    status: str
    why: str = ""


@dataclass(frozen=True)
class Samples:
    """One entry per sample and column. Takes any sequences (arrays and tensors too) and keeps plain tuples.

    clean, published, robust: 1 = still right; robust means not broken by anything tried. stage: index of the stage that
    broke the sample, -1 none, -2 wrong already. margin, margin_adv: logit_y - max_{j != y} logit_j, clean and the worst
    found, rounded to 4 decimals; None where it was not finite. Raises UserError when the columns differ in length.

    >>> Samples([7], [3], [3], [True], [1], [0], [0], [1.23456], [float("nan")]).margin
    (1.2346,)
    """

    index: tuple[int, ...]
    y: tuple[int, ...]
    prediction: tuple[int, ...]
    clean: tuple[int, ...]
    published: tuple[int, ...]
    robust: tuple[int, ...]
    stage: tuple[int, ...]
    margin: tuple[float | None, ...]
    margin_adv: tuple[float | None, ...]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            column = getattr(self, f.name)
            column = column.tolist() if hasattr(column, "tolist") else column
            kept: tuple[float | None, ...]
            if f.name.startswith("margin"):
                kept = tuple(None if v is None or not math.isfinite(v) else round(float(v), 4) for v in column)
            else:
                kept = tuple(map(int, column))
            object.__setattr__(self, f.name, kept)
            if len(kept) != len(self.index):
                raise UserError(f"Samples column '{f.name}' has {len(kept)} entries, 'index' has {len(self.index)}.")

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Stage:
    """One stage of the cascade: samples attacked and broken; passes summed over its samples; seconds."""

    name: str
    attacked: int
    broken: int
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class Example:
    """One broken sample as three pictures (PNG in base64, made by the caller)."""

    index: int
    y: int
    prediction: int
    prediction_adv: int
    x_png: str
    x_adv_png: str
    delta_png: str


@dataclass(frozen=True)
class Run:
    """One trained model, one threat, one evaluation. ``robust`` is None when the verdict is void."""

    name: str
    loss: str
    seed: int | None
    threat: dict[str, Any]  # {"norm", "eps", "lo", "hi"}
    n: int
    clean: Interval
    published: Interval
    robust: Interval | None
    verdict: Verdict | None = None
    checks: list[Any] = field(default_factory=list)  # dicts: name, status ("holds", "fires", "not run"), why
    cost: dict[str, Any] = field(default_factory=dict)  # forwards, backwards (summed over samples), seconds
    stages: tuple[Stage, ...] = ()
    samples: Samples | None = None
    examples: tuple[Example, ...] = ()
    train: dict[str, Any] = field(default_factory=dict)  # accuracy, epochs, seconds, ...
    interval: str = CLOPPER_PEARSON

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "examples", tuple(self.examples))
        for key in ("norm", "eps", "lo", "hi"):
            if key not in self.threat:
                raise UserError(f"Run '{self.name}': threat needs norm, eps, lo and hi; '{key}' is missing.")
        if self.samples is not None and len(self.samples) != self.n:
            raise UserError(f"Run '{self.name}': n is {self.n} but samples has {len(self.samples)} entries.")

    @property
    def threat_text(self) -> str:
        """The threat for reading, as :func:`threat_text` writes it."""
        return threat_text(self.threat)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All a report needs. data: name, classes (names), n, shape, fingerprint; environment: versions, hardware."""

    schema: int = SCHEMA
    runs: tuple[Run, ...]
    data: dict[str, Any]
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""  # ISO 8601
    holdfast: str = ""  # the version that wrote it

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))


def threat_text(threat: dict[str, Any]) -> str:
    """The threat in words.

    >>> threat_text({"norm": "linf", "eps": 0.1}), threat_text({"norm": "linf", "eps": 8 / 255})
    ('linf 0.1', 'linf 8/255')
    """
    eps = float(threat["eps"])
    short, whole = f"{eps:g}", round(eps * 255)
    pixels = len(short) > 5 and abs(eps * 255 - whole) < 1e-5
    return f"{threat['norm']} {f'{whole}/255' if pixels else short}"


def proportion(k: int, n: int) -> Interval:
    """k of n, with the exact 95% interval of Clopper and Pearson (Biometrika 26, 1934).

    low = Beta(k, n-k+1) at 0.025, high = Beta(k+1, n-k) at 0.975; for k = n, low = 0.025^(1/n).
    Raises UserError unless 0 <= k <= n and n >= 1.

    >>> [round(v, 3) for v in dataclasses.astuple(proportion(10, 10))], round(0.025 ** 0.1, 3)
    ([1.0, 0.692, 1.0], 0.692)
    """
    k, n = int(k), int(n)
    if not 0 <= k <= n or n < 1:
        raise UserError(f"proportion expects 0 <= k <= n and n >= 1, got k={k}, n={n}.")
    low = 0.0 if k == 0 else float(stats.beta.ppf(0.025, k, n - k + 1))
    high = 1.0 if k == n else float(stats.beta.ppf(0.975, k + 1, n - k))
    return Interval(k / n, min(low, k / n), max(high, k / n))


def over_seeds(values: Iterable[float]) -> Interval:
    """The mean over seeds and its 95% t interval, mean +- t_{0.975, n-1} sd / sqrt(n) (Student 1908), within [0, 1].

    One seed says nothing of the spread between seeds: its interval is [0, 1]. (A table shows a single run with the
    interval over its samples instead.) Equal values give an interval of no width.

    >>> over_seeds([0.4])
    Interval(value=0.4, low=0.0, high=1.0)
    >>> i = over_seeds([0.4, 0.5, 0.6])      # 0.5 +- 4.303 * 0.1 / sqrt(3)
    >>> round(i.value, 3), round(i.low, 3), round(i.high, 3)
    (0.5, 0.252, 0.748)
    """
    x = [float(v) for v in values]
    if not x or not all(0 <= v <= 1 for v in x):
        raise UserError(f"over_seeds expects one or more proportions in [0, 1], got {x}.")
    if len(x) == 1:
        return Interval(x[0], 0.0, 1.0)
    mean, half = _mean_half(x)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _mean_half(x: Sequence[float]) -> tuple[float, float]:
    n, mean = len(x), min(max(math.fsum(x) / len(x), min(x)), max(x))
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)


def mcnemar(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Exact two-sided p-value that two networks differ on the same samples (McNemar, Psychometrika 12, 1947).

    Of the m samples where exactly one is right, the smaller share k is Binomial(m, 1/2): p = min(1, 2 P(X <= k)).
    It speaks of these two networks, not of the losses they were trained with. Raises UserError on unequal lengths.

    >>> mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])    # 5 against 1: 2 * (1 + 6) / 64
    0.21875
    """
    if len(a) != len(b):
        raise UserError(f"mcnemar expects paired samples, got {len(a)} and {len(b)}.")
    only_a = sum(bool(p) and not q for p, q in zip(a, b, strict=True))
    only_b = sum(bool(q) and not p for p, q in zip(a, b, strict=True))
    m = only_a + only_b
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), m, 0.5))) if m else 1.0


@dataclass(frozen=True)
class Paired:
    """p-value, mean difference a - b, its 95% interval, and the number of pairs."""

    p: float
    difference: float
    low: float
    high: float
    n: int


def paired_t(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Paired t test over seeds (Student 1908): d_i = a_i - b_i, t = mean(d) sqrt(n) / sd(d), n - 1 degrees of freedom.

    a, b: one value per seed, in the same order of seeds, two or more. Identical differences leave no spread: p is then
    1 when they are zero and 0 otherwise, which says little with few seeds. Raises UserError on other lengths.

    >>> r = paired_t([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])     # t = 0.2 sqrt(3) / 0.1; with 2 df p = 1 - t / sqrt(t^2 + 2)
    >>> round(r.difference, 3), round(r.low, 3), round(r.high, 3), round(r.p, 4), round(1 - 12**0.5 / 14**0.5, 4)
    (0.2, -0.048, 0.448, 0.0742, 0.0742)
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"paired_t expects two or more values per side and as many on each, got {len(a)} and {len(b)}.")
    d = [float(p) - float(q) for p, q in zip(a, b, strict=True)]
    mean, half = _mean_half(d)
    n = len(d)
    error = half / float(stats.t.ppf(0.975, n - 1))
    if error < 1e-15:
        return Paired(1.0 if abs(mean) < 1e-15 else 0.0, mean, mean, mean, n)
    return Paired(2 * float(stats.t.sf(abs(mean) / error, n - 1)), mean, mean - half, mean + half, n)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for m questions asked (Holm, Scandinavian Journal of Statistics 6, 1979), in the given order.

    In rising order, adjusted p_(i) = max_{k <= i} min(1, (m - k + 1) p_(k)).

    >>> holm([0.01, 0.04, 0.03])      # 3 * 0.01; 2 * 0.03; then max(0.06, 1 * 0.04)
    [0.03, 0.06, 0.06]
    """
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all: a neighbour first, then a rename. Raises UserError; an old file then stays."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tmp.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise UserError(f"could not write {path}: {e.strerror or e}. What was there before is as it was.") from e
    return path


def save(results: Results, dir: str | Path) -> Path:
    """Writes ``dir/results.json`` atomically and returns its path.

    Raises UserError when it cannot be written (the old file stays) or a value has no place in JSON: NaN, infinity, keys
    that are not text. Tuples inside dicts come back as lists, everything else as it was.
    """
    whole = _encode(results, "results")
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in whole.pop("runs"))
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in whole.items())
    return write_atomic(Path(dir) / FILE, f'{{{head},\n"runs": [\n{runs}\n]}}\n')


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, Samples):  # its columns are plain already
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r}: JSON keys are text. Write str(key).")
        return {k: _encode(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _encode(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}: JSON has no such number. Store None and say why.")
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where} is a {type(value).__name__}: results hold numbers, text, lists and dicts.")
    return value


def load(path: str | Path) -> Results:
    """Reads a results file, or the one in a folder. Raises UserError saying what is wrong and with which field."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which JSON does not allow")

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as e:
        raise UserError(
            f"could not read {path}: {e.strerror}. Give a results.json or the folder that holds one."
        ) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not readable JSON ({e}). Was it cut short or edited by hand?") from e
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int) or "runs" not in raw:
        raise UserError(f"{path} is not a holdfast results file: 'schema' and 'runs' were expected at the top.")
    if raw["schema"] > SCHEMA:
        newer = f"schema {raw['schema']}, this one reads {SCHEMA}. Upgrade holdfast."
        raise UserError(f"{path} was written by a newer holdfast: {newer}")
    try:
        return _decode(Results, raw, "results")
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _decode(get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} should be an object, got {type(value).__name__}.")
        hints, known = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(known)):
            raise UserError(f"{where} has the field '{unknown[0]}', which schema {SCHEMA} does not know.")
        for name, f in known.items():
            if name not in value and f.default is f.default_factory is dataclasses.MISSING:
                raise UserError(f"{where}.{name} is missing.")
        return kind(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    origin: Any = get_origin(kind) or kind
    accepted: Any = {float: (int, float), tuple: list}.get(origin, origin)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UserError(f"{where} should be {origin.__name__}, got {type(value).__name__} ({str(value)[:40]}).")
    if origin is tuple:
        item = get_args(kind)[0]
        plain: set[Any] = {int} if item is int else {int, float, type(None)} if item == float | None else set()
        if value and set(map(type, value)) <= plain:  # a long column, at once
            return tuple(value)
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return value


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss under a threat, over one or more seeds. ``runs`` are indexes into results.runs."""

    label: str  # the loss, told apart by threat or name where the loss alone does not
    loss: str
    threat: str
    clean: Interval
    published: Interval
    robust: Interval | None
    status: str
    verdict: str
    n: int
    seeds: tuple[int | None, ...]
    interval: str
    runs: tuple[int, ...]


def rows(results: Results) -> list[Row]:
    """One row per loss and threat, in order of first appearance.

    Runs that differ in seed alone are merged: mean and t interval over seeds; a single run keeps its own interval. Runs
    of one loss whose seeds repeat are different experiments: one row per run name. One void run makes the row void, and
    the verdict shown is the worst of the merged ones.
    """
    out: list[Row] = []
    for members in _groups(results.runs):
        merged, first = [results.runs[i] for i in members], results.runs[members[0]]
        clean, published, robust, interval = first.clean, first.published, first.robust, first.interval
        if len(merged) > 1:
            clean, published = over_seeds(r.clean.value for r in merged), over_seeds(r.published.value for r in merged)
            found = [r.robust.value for r in merged if r.robust is not None]
            robust = over_seeds(found) if len(found) == len(merged) else None
            interval = f"mean and 95% t interval over {len(merged)} seeds"
        status, text = _worst(merged)
        figures = first.loss, first.loss, first.threat_text, clean, published, robust, status, text, first.n
        out.append(Row(*figures, tuple(r.seed for r in merged), interval, tuple(members)))
    for told in ("{0.threat}", "{1.name}", "n={0.n}", "{0.runs[0]}"):
        taken = Counter(r.label for r in out)
        shown = [told.format(r, results.runs[r.runs[0]]) for r in out]
        named = [f"{r.label} ({t})" if taken[r.label] > 1 else r.label for r, t in zip(out, shown, strict=True)]
        out = [dataclasses.replace(r, label=name) for r, name in zip(out, named, strict=True)]
    return out


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    keys: list[tuple[Any, ...]] = [(r.loss, r.threat_text, r.n) for r in runs]
    for extra in ([r.name for r in runs], range(len(runs))):
        seen = Counter((k, r.seed) for k, r in zip(keys, runs, strict=True))
        repeated = {k for (k, _), times in seen.items() if times > 1}
        keys = [(*k, e) if k in repeated else k for k, e in zip(keys, extra, strict=True)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, k in enumerate(keys):
        groups.setdefault(k, []).append(i)
    return list(groups.values())


def _worst(runs: Sequence[Run]) -> tuple[str, str]:
    verdicts = [r.verdict for r in runs if r.verdict is not None]
    if not verdicts:
        return "", ""
    order = {s: i for i, s in enumerate(_WORST_FIRST)}
    v = min(verdicts, key=lambda v: order.get(v.status, -1))
    alike = sum(w.status == v.status for w in verdicts)
    share = f" ({alike} of {len(runs)} seeds)" if len(runs) > 1 else ""
    return v.status, f"{v.status}: {v.why}{share}" if v.why else v.status + share


def percent(v: float) -> str:
    """A proportion in percent with one decimal, as text."""
    return f"{100 * v:.1f}"


def robust_text(row: Row) -> str:
    """The robust figure with its interval: '43.0 [39.9, 46.1]', with '<= ' before it when loose; 'void' without one."""
    if row.robust is None:
        return "void"
    r, sign = row.robust, "<= " if row.status == "loose" else ""
    return f"{sign}{percent(r.value)} [{percent(r.low)}, {percent(r.high)}]"


_HEAD = ("loss", "clean", "published", "robust, 95% interval", "verdict")


def _cells(row: Row) -> tuple[str, ...]:
    label = re.sub(r"\s+", " ", row.label)
    return label, percent(row.clean.value), percent(row.published.value), robust_text(row), row.status or "-"


def table(results: Results) -> Table:
    """A rich table that fits 80 columns, in percent."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    out.add_column(_HEAD[0], overflow="fold", max_width=26)
    for name in _HEAD[1:]:
        out.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for row in rows(results):
        out.add_row(*(Text(c) for c in _cells(row)))
    return out


def markdown(results: Results) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|---:|---:|---:|---|"]
    for row in rows(results):
        label, *rest = _cells(row)
        lines.append("| " + " | ".join([re.sub(r"([\\`*_<>\[\]|&~$#])", r"\\\1", label), *rest]) + " |")
    return "\n".join(lines) + "\n"


def csv(results: Results) -> str:
    """The rows as CSV, proportions unrounded, empty where there is no figure."""
    out = StringIO()
    write = csv_writer(out, lineterminator="\n").writerow
    bounds = [f"{c}{suffix}" for c in ("clean", "published", "robust") for suffix in ("", "_low", "_high")]
    write(["loss", "threat", *bounds, "verdict", "n", "seeds", "interval"])
    for r in rows(results):
        figures = [v for i in (r.clean, r.published, r.robust) for v in (dataclasses.astuple(i) if i else ("", "", ""))]
        write([r.label, r.threat, *figures, r.verdict, r.n, " ".join(map(str, r.seeds)), r.interval])
    return out.getvalue()


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def latex(results: Results) -> str:
    """The table as a LaTeX tabular, every special character escaped."""
    lines = [r"\begin{tabular}{lrrrl}", r"\hline", " & ".join(_HEAD).replace("%", r"\%") + r" \\", r"\hline"]
    for row in rows(results):
        cells = ["".join(_TEX.get(ch, ch) for ch in c) for c in _cells(row)]
        cells[3] = cells[3].replace(r"\textless{}=", r"$\leq$").replace("[", "{[}").replace("]", "{]}")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
