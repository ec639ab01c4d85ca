"""The rules of the house, held by a test: which way imports run, how long a file may be, which words are used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "holdfast"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up: a file imports from lower layers, or from its own, where that makes no circle.
LAYERS = (
    (
        "",
        "errors",
        "noise",
        "outputs",
        "witnesses",
        "progress",
        "process_pool",
        "environment",
        "straight_through",
        "mapped",
        "optional_package",
    ),  # "": its version
    ("user_input",),
    ("threat", "spec", "io", "importers", "losses", "data"),
    ("results", "attacks", "models", "queries", "witness_files"),
    ("report", "bounds", "milp", "region", "run_folder", "doctor"),
    ("evaluation", "information", "replay"),
    ("transforms",),
    ("checks", "objectives"),
    ("train",),
    ("experiments",),
    ("bracket", "smoothing", "targeted"),
    ("cli",),
    ("__main__",),
)
# What a room may know, where its layer alone would allow more.
KNOWS = {
    "report": {"results", "errors", "io", "user_input"},
    "results": {"errors", "io", "user_input"},
    "io": {"errors", "user_input", "mapped"},
    "attacks": {"losses", "threat", "noise", "outputs", "errors", "user_input"},
    "bounds": {"models", "importers", "threat", "outputs", "errors", "io", "user_input"}
    | {"noise", "data", "queries", "progress", "results"},  # of smoothing, which counts answers
}
# Words that are forbidden for one idea and the field's own for another, and where: alpha is no step size in smoothing,
# but the probability that a certificate is wrong; and the slope of a line under a ReLU in bounds.
MEANT = {
    "alpha": (
        "bounds/ladder.py",
        "bounds/linear.py",
        "bounds/steps.py",
        "bounds/branch.py",
        "bounds/smoothing.py",
        "bounds/votes.py",
        "smoothing/",
        "cli/smooth.py",
    )
}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FORBIDDEN = {
    "inputs": "x", "labels": "y", "images": "x", "epsilon": "eps", "iters": "steps", "num_steps": "steps",
    "n_iter": "steps", "alpha": "step_size", "generator": "noise", "natural": "clean", "published": "pgd50",
    "drawn": "sampled", "promoted": "escalated", "watch": "val_threat", "gap": "negative_log_odds",
    "gaps": "logit_differences", "rise": "score_and_grad", "look": "predict", "aim": "targeted_score",
    "towards": "targeted", "verify": "replay", "told": "name the thing", "reach": "l2_radius", "alone": "individual",
    "record": "checkpoint", "tell": "progress", "twin": "transfer_source", "standing": "survivors",
    "stands": "survives", "goal": "target_score", "finished": "complete", "who": "subset",
    "judged": "audit", "remainder": "remaining", "around": "center", "own": "score", "liar": "faulty model",
    "dose": "severity", "foreign": "imported",
}  # fmt: skip


def dotted(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return [*module.split("."), ""][1]


@cache
def imported(path):
    """The holdfast modules that a file imports, anywhere in it: under a function or TYPE_CHECKING too."""
    if path == SOURCE / "__init__.py":  # its public names are lazy: it imports nothing but for type checkers
        return set()
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "holdfast"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[0] == "holdfast":
                whole = ".".join(base)
                names = {f"{whole}.{alias.name}" for alias in node.names}
                found |= {name if exists(name) else whole for name in names}
    return found


def exists(module):
    path = SOURCE.parent / Path(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def rooms():
    edges = {}
    for path in FILES:
        edges.setdefault(room(dotted(path)), set()).update(room(name) for name in imported(path))
    return {mine: theirs - {mine} for mine, theirs in edges.items()}


def test_the_parser_sees_every_form_of_import():
    assert rooms()["cli"] >= {"experiments", "spec", "report", "replay", "results"}
    assert "attacks" in rooms()["objectives"]
    assert rooms()["errors"] == set()
    assert "holdfast.models" in imported(SOURCE / "run_folder.py")  # from . import models


def test_every_module_has_a_place():
    assert set(rooms()) == set(LEVEL), f"give it a layer: {set(rooms()) ^ set(LEVEL)}"


def test_imports_run_one_way():
    above = [(a, b) for a, theirs in rooms().items() for b in theirs if LEVEL[b] > LEVEL[a]]
    unknown = [(a, b) for a, known in KNOWS.items() for b in rooms()[a] - known]
    assert not above
    assert not unknown
    joined = [room for room, theirs in rooms().items() if {"train", "evaluation"} <= theirs and room != "cli"]
    assert joined == ["experiments"]


def test_no_circles_between_files():
    files = {dotted(path): imported(path) - {dotted(path)} for path in FILES}
    done, way = set(), []

    def visit(mine):
        assert mine not in way, " -> ".join([*way, mine])
        if mine not in done:
            way.append(mine)
            for theirs in sorted(files.get(mine, ())):
                visit(theirs)
            way.pop()
            done.add(mine)

    for mine in files:
        visit(mine)


def test_below_the_line_there_is_no_torch():
    """results.json and the report are pure data: neither imports torch, at any depth."""
    code = "import sys, holdfast.results, holdfast.report; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_replay_runs_no_attack_code():
    """One forward pass over stored images: it imports neither attacks nor evaluation, at any depth."""
    reach, todo = set(), ["replay"]
    while todo:
        for theirs in rooms()[todo.pop()] - reach:
            reach.add(theirs)
            todo.append(theirs)
    assert not reach & {"attacks", "evaluation", "objectives", "train"}


@cache
def trees():
    return {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in FILES}


def length(node):
    return node.end_lineno - node.lineno + 1


def test_files_classes_and_functions_are_short():
    long = [str(path) for path in FILES if len(path.read_text().splitlines()) > 500]
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and length(node) > 100:
                long.append(f"{path}: function {node.name}, {length(node)} lines")
            if isinstance(node, ast.ClassDef) and length(node) > 250:
                long.append(f"{path}: class {node.name}, {length(node)} lines")
    assert not long


def test_nothing_is_left_to_do():
    assert not [
        path for path in FILES if re.search(r"TODO|FIXME|XXX|NotImplementedError|breakpoint\(", path.read_text())
    ]


def test_what_is_public_says_what_it_is():
    """Modules, and their public classes and functions, have a docstring."""
    silent = [path for path, tree in trees().items() if not ast.get_docstring(tree)]
    silent += [
        (path, node.name)
        for path, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    assert not silent


def test_input_is_not_checked_by_assert():
    """An assert vanishes under python -O."""
    assert not [
        (path, node.lineno) for path, tree in trees().items() for node in ast.walk(tree) if isinstance(node, ast.Assert)
    ]


def public_names(tree):
    """Names and arguments of public functions and methods, and fields of public classes, as (where, name)."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        parts = [node, *node.body] if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield node.name, part.target.id
            elif isinstance(part, ast.FunctionDef) and (not part.name.startswith("_") or part.name == "__init__"):
                yield node.name, part.name
                for argument in (*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs):
                    yield node.name, argument.arg


def test_one_word_per_idea():
    """The vocabulary of public functions, arguments and fields."""
    found = {(str(path), *name) for path, tree in trees().items() for name in public_names(tree)}
    assert len(found) > 1000
    assert not [
        f"{path}, {where}: say {FORBIDDEN[word]}, not {word}"
        for path, where, word in found
        if word in FORBIDDEN and not path.startswith(MEANT.get(word, ("-",)))
    ]


def test_paths_may_be_text():
    """What the reference documents takes a path as text: no public function asks for a Path."""
    pages = [page.read_text() for page in ROOT.glob("docs/**/*.md")]
    documented = [re.findall(r"^::: (holdfast[\w.]*)", page, re.MULTILINE) for page in pages]
    found = []
    for module in {importlib.import_module(name) for names in documented for name in names}:
        for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
            thing = getattr(module, name)
            mine = hasattr(module, "__all__") or getattr(thing, "__module__", "") == module.__name__
            if inspect.isfunction(thing) and mine:
                for argument, kind in thing.__annotations__.items():
                    words = str(kind).replace(" ", "").split("|")
                    if argument != "return" and "Path" in words and "str" not in words:
                        found.append((module.__name__, name, argument))
    assert not sorted(set(found))


def test_all_is_what_there_is():
    for path in FILES:
        if path.name != "__main__.py":
            module = importlib.import_module(dotted(path))
            assert not [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)], path


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["holdfast", "holdfast.errors", "holdfast.cli"])
def test_importing_it_is_fast(module):
    """No torch behind it: --help and --version answer at once."""
    heavy = ("torch", "datasets", "matplotlib", "sklearn", "accelerate", "scipy")
    assert run(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_parts_are_found_in_the_package_without_an_import_of_their_own():
    assert run("import holdfast; print(holdfast.run_folder.load.__name__, holdfast.transforms.__name__)").split() == [
        "load", "holdfast.transforms",
    ]  # fmt: skip


def test_every_room_can_be_imported_first():
    """No module works only because another one was imported before it. A file's room is always imported before it."""
    rooms = [dotted(path) for path in FILES if path.parent == SOURCE or path.parent.parent == SOURCE]
    rooms = sorted({".".join(name.split(".")[:2]) for name in rooms} - {"holdfast.__main__"})
    code = (
        "import importlib, sys\n"
        f"for name in {rooms}:\n"
        "    for m in [m for m in sys.modules if m.split('.')[0] == 'holdfast']: del sys.modules[m]\n"
        "    importlib.import_module(name)\n"
        "print('ok')"
    )
    assert run(code) == "ok"


def test_the_dicts_hold_what_they_say():
    """Every entry of every dict is callable, has a line about it, and a name that a command line can carry."""
    from holdfast.cli.catalogue import catalogue

    for kind, named in catalogue().items():
        for name, about in named.items():
            assert re.fullmatch(r"[a-z][a-z0-9_-]*", name), (kind, name)
            assert about, (kind, name)
            assert len(about) <= 118, (kind, name)


def test_fit_takes_no_test_data_and_losses_take_no_reduction():
    from holdfast.losses import LOSSES

    for entry in LOSSES.values():
        parameters = inspect.signature(entry.loss).parameters
        assert list(parameters)[:2] == ["out", "y"]
        assert "reduction" not in parameters


def readme_commands():
    blocks = re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.split("#")[0].split() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_exist_in_the_makefile():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [words[1:] for words in readme_commands() if words[0] == "make"]
    assert asked
    for words in asked:
        for word in words:
            assert "=" in word or word in targets, word


def test_readme_commands_of_holdfast_exist():
    from holdfast.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    for words in readme_commands():
        if words[0].endswith("holdfast") and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in known, words


def test_make_targets_are_phony_or_files():
    """`make test` runs although a folder may be called tests: every word-like target is declared phony."""
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)[0].split())
    assert targets <= phony


def test_the_installed_version_is_the_one_of_the_package():
    import holdfast

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert holdfast.__version__ == declared.group(1)
