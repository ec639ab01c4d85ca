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

# From the ground up: a module imports from lower layers, or from its own, where that makes no circle.
LAYERS = (
    ("", "errors", "noise"),  # "" is the package itself, which holds the version
    ("outputs", "threat", "information", "results", "onnx_import"),
    ("losses", "orthogonal", "storage"),
    ("heads", "attacks", "data"),
    ("models", "specs", "foreign", "asking"),
    ("bounds",),
    ("sources",),
    ("objectives", "runs", "evaluate", "exact"),
    ("train", "verify", "jobs", "checks", "rows", "region"),
    ("assemble",),
    ("auditing",),
    ("compare",),
    ("recipes", "report", "single"),
    ("bracket", "curves", "waterfall"),
    ("catalogue", "display"),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FORBIDDEN = {
    "inputs": "x", "labels": "y", "images": "x", "epsilon": "eps", "iters": "steps", "num_steps": "steps",
    "n_iter": "steps", "alpha": "step_size", "generator": "noise", "natural": "clean",
}  # fmt: skip


def dotted(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return [*module.split("."), ""][1]


@cache
def imported(path):
    """The holdfast modules that a file imports, anywhere in it: under a function or TYPE_CHECKING too."""
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
def graph():
    edges = {}
    for path in FILES:
        mine = room(dotted(path))
        edges.setdefault(mine, set()).update(room(name) for name in imported(path))
    return {mine: theirs - {mine} for mine, theirs in edges.items()}


def test_the_parser_sees_every_form_of_import():
    assert {"losses", "objectives", "attacks", "results"} <= set(graph())
    assert graph()["cli"] >= {"compare", "specs", "report", "verify", "catalogue", "recipes", "results"}
    assert "attacks" in graph()["objectives"]
    assert graph()["errors"] == set()
    assert "holdfast.models" in imported(SOURCE / "compare.py")  # from . import models


def test_every_module_has_a_place():
    assert set(graph()) <= set(LEVEL), f"give it a layer in tests/test_house.py: {set(graph()) - set(LEVEL)}"


@pytest.mark.parametrize("mine", sorted(graph()))
def test_imports_run_one_way(mine):
    above = {theirs for theirs in graph()[mine] if LEVEL[theirs] > LEVEL[mine]}
    assert not above, f"{mine} imports {', '.join(sorted(above))}, which stands above it"


def test_no_circles():
    edges, done, way = graph(), set(), []

    def visit(mine):
        assert mine not in way, " -> ".join([*way, mine])
        if mine not in done:
            way.append(mine)
            for theirs in sorted(edges[mine]):
                visit(theirs)
            way.pop()
            done.add(mine)

    for mine in edges:
        visit(mine)


def test_nothing_imports_the_command_line():
    assert not [mine for mine, theirs in graph().items() if "cli" in theirs and mine != "__main__"]


def test_report_imports_results_alone():
    assert graph()["report"] <= {"results", "errors"}
    assert graph()["results"] <= {"errors"}


def test_below_the_line_there_is_no_torch():
    """results.json and the report are pure data: neither imports torch, at any depth."""
    code = "import sys, holdfast.results, holdfast.report; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_verify_runs_no_attack_code():
    """It proves bounds again with one forward pass: it imports neither attacks nor evaluate, at any depth."""
    reach, todo = set(), ["verify"]
    while todo:
        for theirs in graph()[todo.pop()] - reach:
            reach.add(theirs)
            todo.append(theirs)
    assert not reach & {"attacks", "evaluate", "objectives", "train"}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_nothing_is_left_to_do(path):
    assert not re.findall(r"TODO|FIXME|XXX|NotImplementedError|breakpoint\(", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_what_is_public_says_what_it_is(path):
    """Modules, and their public classes and functions: a docstring; methods too, but for short properties."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_input_is_not_checked_by_assert(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not lines, f"an assert vanishes under python -O: lines {lines}"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_one_word_per_idea(path):
    """The vocabulary of public signatures: functions, methods, dataclass fields."""
    wrong = []

    def scan(node, where):
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", "")
            if isinstance(child, ast.ClassDef) and not name.startswith("_"):
                for field in child.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        check(field.target.id, f"{where}{name}")
                scan(child, f"{where}{name}.")
            elif isinstance(child, ast.FunctionDef) and (not name.startswith("_") or name == "__init__"):
                arguments = child.args
                for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                    check(argument.arg, f"{where}{name}")

    def check(word, where):
        if word in FORBIDDEN:
            wrong.append(f"{where}({word}): say {FORBIDDEN[word]}")

    scan(ast.parse(path.read_text()), "")
    assert not wrong


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["holdfast", "holdfast.errors", "holdfast.cli"])
def test_importing_it_is_fast(module):
    """No torch behind it: --help and --version answer at once."""
    heavy = ("torch", "datasets", "matplotlib", "sklearn", "accelerate", "scipy")
    assert run(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_every_module_can_be_imported_first():
    """No module works only because another one was imported before it."""
    names = [dotted(path) for path in FILES if path.name != "__main__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    for m in [m for m in sys.modules if m.split('.')[0] == 'holdfast']: del sys.modules[m]\n"
        "    importlib.import_module(name)\n"
        "print('ok')"
    )
    assert run(code) == "ok"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_all_is_what_there_is(path):
    if path.name == "__main__.py":
        return
    module = importlib.import_module(dotted(path))
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def test_the_dicts_hold_what_they_say():
    """Every entry of every dict is callable, has a line about it, and a name that a command line can carry."""
    from holdfast.catalogue import catalogue

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
