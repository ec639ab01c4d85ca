"""What mkdocs adds to the pages in docs/: the page of the losses, made from the code, the examples, the records, and
the papers at the root."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import curves  # noqa: E402
from docstrings import as_markdown  # noqa: E402

from holdfast.losses import LOSSES  # noqa: E402

PAPERS = ("CHANGELOG.md", "CONTRIBUTING.md")
LOSS_PAGE = """# Losses: formulas and curves

This page is made from the code at every build: each text is the loss's docstring, each curve its own values.

Logits are z, the true class is y, and u = logsumexp_{{j != y}} z_j - z_y: below 0 the true class has more than half of
the probability, and all attacks push u up. To draw them, one image moves from a little behind its own class's center to
a rival's ({classes} classes on a regular simplex of radius {radius:g}; cosines times {scale:g}). The left picture shows
the loss, the right one its slope, d loss / d u: what a sample at u still contributes to training. Losses that compare
the samples of a batch are drawn with two mates, one at each center. What these losses are worth in training is measured
[on another page](losses.md); what an attack on each of them climbs is [a third](adaptive.md).

| loss | what it is | head | attacks climb |
|---|---|---|---|
"""


def loss_page() -> str:
    """The page of all entries of LOSSES."""
    page = LOSS_PAGE.format(classes=curves.CLASSES, radius=curves.RADIUS, scale=curves.SCALE)
    for name, entry in LOSSES.items():
        about = entry.about.replace("|", "\\|")
        page += f"| [`{name}`](#{name}) | {about} | `{entry.head}` | `{entry.score.__name__}` |\n"
    for name, entry in LOSSES.items():
        text = as_markdown(inspect.getdoc(entry.loss) or "")
        page += f"\n## {name} {{ #{name} }}\n\n![{name} and its slope against u](assets/{name}.svg)\n\n{text}\n"
    return page


def example_page() -> str:
    """The scripts in examples/, each under the first line of its docstring."""
    page = "# Examples\n\nEach script stands alone, runs in seconds on the embedded digits, and is run by the tests.\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text()
        title = code.removeprefix('"""').partition("\n")[0].removesuffix('"""').rstrip(".")
        page += f"\n## {title}\n\n`python examples/{path.name}`\n\n```python\n{code}```\n"
    return page


def on_files(files: Files, config: Any) -> Files:
    """Add what does not lie in docs/."""
    made: dict[str, str | bytes] = {
        "loss-curves.md": loss_page(),
        "examples.md": example_page(),
        "assets/dead-zone.svg": curves.draw_dead_zone(),
        **{f"assets/{name}.svg": curves.draw_loss(name) for name in LOSSES},
    }
    for address, content in made.items():
        files.append(File.generated(config, address, content=content))
    found = [ROOT / paper for paper in PAPERS]
    found += [path for path in sorted((ROOT / "records").rglob("*")) if path.suffix in (".md", ".png")]
    for path in found:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, made right for the site, where docs/ is the root."""
    if page.file.src_uri in PAPERS:
        return markdown.replace("](docs/", "](")
    return re.sub(r"\]\(\.\./((?:\.\./)*(?:records/|CHANGELOG|CONTRIBUTING))", r"](\1", markdown)
