"""The documentation does what it says: its commands and Python are run in order, its examples too, and the site builds.

In a page, a ```console block is run line by line ($ before each command) and a ```python block is run where it stands,
all in one empty folder. What is shown below a command, or in a ```text block below Python, must be in what was printed,
word for word; numbers and verdicts may differ from machine to machine. A ```python block with a title is a file of that
name. A ```bash block is not run (it needs a network, hours or a second device), but each holdfast command in it must be
one that exists.

``WRITE_DOCS=1 pytest tests/test_docs.py -k says`` puts what is printed into the pages, except where they show "...".
"""

from __future__ import annotations

import ast
import functools
import html
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import typer
import yaml

import holdfast
from holdfast import attacks, cli, losses
from holdfast.evaluation import suites

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "api" not in path.relative_to(DOCS).parts)
PAPERS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FREE = {"tight", "loose", "refuted", "void"}  # words that may change with a machine's rounding
INTERNAL = {
    "__main__", "cli", "doctor", "environment", "io", "mapped", "optional_package", "outputs", "process_pool",
    "queries", "spec", "straight_through", "user_input", "witness_files",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the title if it has one, its text, the line it begins on."""

    kind: str
    title: str
    text: str
    line: int


def blocks(page):
    """The fenced blocks of a page, in order."""
    found, lines = [], page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```(\w*)(?:\s+title=\"([^\"]+)\")?\s*$", line)
        if fence and start is None:
            start, kind, title = number, fence[1], fence[2] or ""
        elif fence:
            found.append(Block(kind, title, "\n".join(lines[start + 1 : number]) + "\n", start + 1))
            start = None
    assert start is None, f"{page}: the block of line {start + 1} has no end"
    return found


def commands(text):
    """(command, what is shown below it) of a console block."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"a console block begins with a command, not with {line!r}"
            found[-1][1].append(line)
    return [(command, "\n".join(shown)) for command, shown in found]


def words(text):
    return set(re.findall(r"[A-Za-z_][A-Za-z_.-]*[A-Za-z_]", text)) - FREE


def assert_shown(shown, printed, where):
    """A few words may differ too: a sentence leaves out what it counts none of."""
    missing = words(shown) - words(printed)
    enough = len(missing) <= len(words(shown)) / 5 or "WRITE_DOCS" in os.environ
    assert enough, f"{where} shows {sorted(missing)}. It printed:\n{printed}"


def call(command, capsys):
    """What a holdfast command prints (progress is not of it), run in this process; it must end well."""
    program, *arguments = shlex.split(command)
    assert program == "holdfast", f"a console block runs holdfast, not {program}"
    sys.argv = [program, *arguments]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed, progress = capsys.readouterr()
    assert ended.value.code in (0, None), f"'{command}' ended with {ended.value.code}:\n{printed}{progress}"
    return printed


def run(page, capsys):
    """Run a page's blocks in order, here; says what each printed."""
    names, told, printed = {"__name__": "__main__"}, [], ""
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}, line {block.line},"
        if block.kind == "console":
            for command, shown in commands(block.text):
                printed = call(command, capsys)
                assert_shown(shown, printed, where)
                told.append((block, command, printed))
        elif block.kind == "python" and block.title:
            compile(block.text, block.title, "exec", dont_inherit=True)
            Path(block.title).write_text(block.text)
        elif block.kind == "python":
            capsys.readouterr()
            code = "\n" * block.line + block.text  # so that an error names the page's own line
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
            printed = capsys.readouterr().out
            told.append((block, "", printed))
        elif block.kind == "text" and printed:
            assert_shown(block.text, printed, where)
            told.append((block, "", printed))
    return told


def write(page, told):
    """Put what was printed into a page's console and text blocks."""
    lines = page.read_text().splitlines()
    for block in reversed(blocks(page)):
        new = []
        for _, command, printed in (entry for entry in told if entry[0] == block):
            shown = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")
            old = dict(commands(block.text)).get(command, "") if command else block.text
            shown = old.strip("\n") if "...\n" in f"{old}\n" else shown
            new.append(f"$ {command}\n{shown}".rstrip() if command else shown)
        if new and block.kind in ("console", "text"):
            lines[block.line : block.line + len(block.text.splitlines())] = "\n\n".join(new).splitlines()
    page.write_text("\n".join(lines) + "\n")


@pytest.fixture
def clean_room(tmp_path, monkeypatch):
    """An empty folder, and whatever a page adds to holdfast's dicts taken out again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.syspath_prepend(tmp_path)  # as for a reader whose Python runs there
    modules = set(sys.modules)
    kept = [(named, dict(named)) for named in (losses.LOSSES, attacks.ATTACKS, suites.SUITES, attacks.SCORES)]
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    for named, before in kept:
        named.clear()
        named.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


RUN = [page for page in PAGES if any(b.kind == "console" or (b.kind == "python" and not b.title) for b in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_does_what_it_says(page, clean_room, capsys):
    told = run(page, capsys)
    assert told
    if "WRITE_DOCS" in os.environ:
        write(page, told)


def test_the_tutorial_and_all_how_tos_are_among_them():
    run_here = {page.relative_to(DOCS).as_posix() for page in RUN}
    assert {"tutorial.md", "theory.md", "lies.md"} <= run_here
    not_run = {page.name for page in (DOCS / "how-to").glob("*.md")} - {Path(name).name for name in run_here}
    assert not_run <= {"gpus.md"}


@pytest.mark.parametrize(
    "text",
    [
        "```python\nraise RuntimeError\n```\n",
        "```python\nassert 1 == 2\n```\n",
        "```console\n$ holdfast evaluate nowhere --suite quick\n```\n",
        "```console\n$ holdfast --version\nanother program\n```\n",
        "```console\n$ rm -rf nothing\n```\n",
        '```python\nprint("one")\n```\n\n```text\ntwo\n```\n',
    ],
)
def test_a_page_that_does_not_do_what_it_says_is_found_out(text, clean_room, capsys):
    page = clean_room / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(text)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        run(page, capsys)


def parsed(command):
    """Parse a holdfast command without running it: its name and options must exist, its values be of their type."""
    _, name, *arguments = shlex.split(command)
    known = typer.main.get_command(cli.app)
    if name.startswith("-"):
        return
    assert name in known.commands, f"there is no holdfast {name}"
    with known.commands[name].make_context(name, arguments):
        pass


@pytest.mark.parametrize("page", [*PAGES, *PAPERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_that_are_not_run_exist(page):
    for block in blocks(page):
        if block.kind in ("bash", ""):
            text = re.sub(r"\\\n\s*", "", block.text)
            for line in re.findall(r"(?:^|-m )holdfast [a-z].*", text, re.M):
                parsed(re.sub(r"\s+#.*|^-m ", "", line))


def test_a_command_that_does_not_exist_is_found_out():
    parsed("holdfast train --loss sce --out x")
    for wrong in ("holdfast learn", "holdfast train --out x --los sce", "holdfast train --out x --epochs many"):
        with pytest.raises(Exception, match=r"no holdfast|option|integer"):
            parsed(wrong)


@pytest.mark.parametrize("page", [*PAGES, *PAPERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    made = {"loss-curves.md", "examples.md"}  # at build time, by docs/hooks.py; and the curves
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = unquote(target.partition("#")[0])
        if path and not re.match(r"[a-z]+:", path) and Path(path).name not in made and "assets/" not in path:
            assert (page.parent / path).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs(script, clean_room, capsys):
    assert len(script.read_text().splitlines()) < 60
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs(notebook, clean_room):
    """Cell by cell, as a kernel does; the last value of a cell shows itself."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names, shown = {}, []
    for cell in cells:
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), str(notebook), "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(notebook), "eval"), names))
        else:
            exec(compile(ast.Module([last], []), str(notebook), "exec"), names)
    assert sum(hasattr(value, "_repr_html_") for value in shown) >= 3
    assert any(hasattr(value, "savefig") for value in shown)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a broken link, a page that is missing from the menu, a warning are errors."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_asks_for_nothing_from_a_network(site):
    for page in site.rglob("*.html"):
        asked = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//[^\"]+", page.read_text())
        asked += re.findall(r"<link[^>]+stylesheet[^>]+href=\"(?:https?:)?//[^\"]+", page.read_text())
        assert not asked, f"{page.relative_to(site)} asks for {asked}"


def test_the_site_has_a_curve_and_a_text_for_every_loss(site):
    page = (site / "loss-curves.html").read_text()
    for name, entry in losses.LOSSES.items():
        assert f'<h2 id="{name}"' in page
        assert (site / "assets" / f"{name}.svg").stat().st_size < 60_000
        assert html.escape((entry.loss.__doc__ or "").splitlines()[0].split("||")[0].split("_")[0][:30]) in page


def test_the_reference_has_every_public_module(site):
    """Every module below holdfast is in the reference, or says here that it is a part of another, or internal."""
    shown = {name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
    package = Path(holdfast.__file__).parent
    rooms = {Path(path.relative_to(package).parts[0]).stem for path in package.rglob("*.py")} - {"__init__"}
    missing = rooms - {name.split(".")[1] for name in shown} - INTERNAL
    assert not missing, f"give {sorted(missing)} a place in docs/api, or among INTERNAL here"
    assert 'id="holdfast.losses.isce"' in (site / "api" / "losses.html").read_text()


def test_curves_are_the_same_at_every_build(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import curves

    assert curves.draw_loss("isce") == curves.draw_loss("isce")
    u, loss, slope = curves.values(losses.LOSSES["isce"], {"s": 3.0})
    assert torch.allclose(loss, torch.nn.functional.softplus(u + 3))
    assert torch.allclose(slope, torch.sigmoid(u + 3))


def test_the_citation_names_this_version_and_the_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["title"] == "holdfast"
    assert cited["version"] == holdfast.__version__
    assert {"message", "authors", "type", "license"} <= cited.keys()
    assert any(paper.get("doi") == "10.3390/math10193716" for paper in cited["references"])


def test_every_function_on_the_path_of_the_data_is_where_the_page_says():
    page, package = (DOCS / "path.md").read_text(), Path(holdfast.__file__).parent
    steps = re.findall(r"^\| *(\d+) \| `([\w/]+\.py):([\w.]+)` \|", page, re.M)
    assert [int(number) for number, _, _ in steps] == [*range(1, 11), *range(1, 11)]
    for _, file, name in steps:
        name_of_module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = importlib.import_module(f"holdfast.{name_of_module}")
        found = functools.reduce(getattr, name.split("."), module)
        assert Path(inspect.getsourcefile(inspect.unwrap(found))) == package / file


def test_doctests_of_the_reference_are_code(site):
    """Markdown alone takes their >>> for quotes."""
    pages = list((site / "api").glob("*.html"))
    assert len(pages) > 10
    assert sum(page.read_text().count('class="gp"') for page in pages) > 50
    assert not [page.name for page in pages if "<blockquote>" in page.read_text()]


def test_formulas_are_set(site):
    """Written between $$, which the pages of a forge set as well."""
    page = (site / "theory.html").read_text()
    assert page.count("<math") == (ROOT / "docs" / "theory.md").read_text().count("$$") / 2 > 5
    assert "$$" not in page
