"""The shape of an evaluation's results, and their JSON: saved whole or not at all, read back equal."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..io import write_atomic

SCHEMA = 4
FILE = "results.json"
CLOPPER_PEARSON = "95% Clopper-Pearson interval over samples"


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
    found, rounded to 4 decimals; None where it was not finite. certified: 1 = proved to be right on all of the threat;
    no column where no bound is known. prediction_adv: the class predicted for the worst image found. Raises UserError
    when the columns differ in length.

    >>> Samples([7], [3], [3], [True], [1], [0], [0], [1.23456], [float("nan")]).margin
    (1.2346,)
    """

    index: tuple[int, ...]
    y: tuple[int, ...]
    prediction: tuple[int, ...]
    clean: tuple[int, ...]
    pgd50: tuple[int, ...]
    robust: tuple[int, ...]
    stage: tuple[int, ...]
    margin: tuple[float | None, ...]
    margin_adv: tuple[float | None, ...]
    certified: tuple[int, ...] | None = None
    prediction_adv: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            column = getattr(self, f.name)
            if column is None and f.default is None:
                continue
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
    """One trained model, one threat, one evaluation. ``robust`` is None when the verdict is void.

    verdict: on the robust accuracy; pgd50_verdict: on the published one; own: accuracy under the published protocol
    on the trained loss itself, where it was run; certified: share that is proved to be right on all of the threat, the
    lower end of what ``robust`` is the upper end of; None where no bound is known, and when void; alone: accuracy under
    each attack that was run on all that is right, where a suite has such protocols, in its order; checks: what each
    trust check found; remainder: what may still be breakable (expected, low, high, in samples); measures: input_margin,
    zero_gradient, zero_gradient_own; region: measures of the inference region and of how features move; picture: what
    is needed to draw them in two dimensions.
    """

    name: str
    loss: str
    seed: int | None
    threat: dict[str, Any]  # {"norm", "eps", "lo", "hi"}
    n: int
    clean: Interval
    pgd50: Interval
    robust: Interval | None
    verdict: Verdict | None = None
    pgd50_verdict: Verdict | None = None
    own: Interval | None = None
    checks: list[Any] = field(default_factory=list)  # dicts: name, status ("holds", "fires", "not run"), why, ...
    remaining: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)  # forwards, backwards (summed over samples), seconds
    stages: tuple[Stage, ...] = ()
    samples: Samples | None = None
    examples: tuple[Example, ...] = ()
    train: dict[str, Any] = field(default_factory=dict)  # accuracy, epochs, seconds, ...
    interval: str = CLOPPER_PEARSON
    certified: Interval | None = None
    individual: dict[str, Interval] = field(default_factory=dict)
    region: dict[str, Any] = field(default_factory=dict)  # as holdfast.region.measure returns it
    picture: dict[str, Any] = field(default_factory=dict)  # as holdfast.region.picture returns it

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


def save(results: Results, dir: str | Path) -> Path:
    """Writes ``dir/results.json`` atomically and returns its path.

    Raises UserError when it cannot be written (the old file stays), and as ``to_json`` does.
    """
    return write_atomic(Path(dir) / FILE, to_json(results))


def to_json(results: Results) -> str:
    """The text of a results file, a run a line.

    Raises UserError for a value that has no place in JSON: NaN, infinity, keys that are not text. Tuples inside dicts
    come back as lists, everything else as it was.
    """
    whole = _encode(results, "results")
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in whole.pop("runs"))
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in whole.items())
    return f'{{{head},\n"runs": [\n{runs}\n]}}\n'


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
    known = isinstance(raw, dict) and type(raw.get("schema")) is int and raw["schema"] >= 1
    if not known or "runs" not in raw:
        raise UserError(f"{path} is not a holdfast results file: 'schema' and 'runs' were expected at the top.")
    if raw["schema"] > SCHEMA:
        newer = f"schema {raw['schema']}, this one reads {SCHEMA}. Upgrade holdfast."
        raise UserError(f"{path} was written by a newer holdfast: {newer}")
    if raw["schema"] < SCHEMA:
        command = raw.get("command")
        rerun = f"rerun the command that made it: {command}" if command else "rerun the command that made it."
        raise UserError(f"{path} has results schema {raw['schema']}, this holdfast reads schema {SCHEMA}: {rerun}")
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
    if origin is dict:
        return {k: _decode(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        item = get_args(kind)[0]
        plain: set[Any] = {int} if item is int else {int, float, type(None)} if item == float | None else set()
        if value and set(map(type, value)) <= plain:  # a long column, at once
            return tuple(value)
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return value
