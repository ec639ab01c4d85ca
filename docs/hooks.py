"""Pages that mkdocs adds to those in docs/: losses from the code, examples, records, CHANGELOG and CONTRIBUTING."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import curves  # noqa: E402

from holdfast.losses import LOSSES  # noqa: E402

PAPERS = ("CHANGELOG.md", "CONTRIBUTING.md")
LOSS_PAGE = """# Losses: formulas and curves

This page is built from the code: each text is the loss's docstring, and each curve is computed by the loss.

Logits are z, the true class is y, and u = logsumexp_{{j != y}} z_j - z_y. Below u = 0 the true class has more than
half of the probability; every attack increases u. For the curves, one image moves from just behind the center of its
own class to the center of a rival ({classes} classes on a regular simplex of radius {radius:g}; cosines times
{scale:g}). The left curve is the loss, the right one its derivative d loss / d u: how much a sample at u contributes to
training. Losses that compare the samples of a batch are drawn with two other samples, one at each center. See also
[how these losses perform](losses.md) and [the score that attacks maximise](adaptive.md).

| loss | what it is | head | attacks maximise |
|---|---|---|---|
"""
LOSS = """
## {name} {{ #{name} }}

![{name} and its derivative with respect to u](assets/{name}.svg)

::: {address}
    options:
      heading_level: 3
      show_root_heading: false
      show_root_toc_entry: false
"""


def loss_page() -> str:
    """The page of all entries of LOSSES."""
    page = LOSS_PAGE.format(classes=curves.CLASSES, radius=curves.RADIUS, scale=curves.SCALE)
    for name, entry in LOSSES.items():
        about = entry.about.replace("|", "\\|")
        page += f"| [`{name}`](#{name}) | {about} | `{entry.head}` | `{entry.score.__name__}` |\n"
    for name, entry in LOSSES.items():
        page += LOSS.format(name=name, address=f"{entry.loss.__module__}.{entry.loss.__qualname__}")
    return page


def example_page() -> str:
    """The scripts in examples/, each under the first line of its docstring."""
    page = "# Examples\n\nEach script runs on its own, in seconds, on the embedded digits. The tests run all of them.\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text()
        title = code.removeprefix('"""').partition("\n")[0].removesuffix('"""').rstrip(".")
        page += f"\n## {title}\n\n`python examples/{path.name}`\n\n```python\n{code}```\n"
    return page


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in docs/."""
    generated: dict[str, str | bytes] = {
        "loss-curves.md": loss_page(),
        "examples.md": example_page(),
        "assets/dead-zone.svg": curves.draw_dead_zone(),
        **{f"assets/{name}.svg": curves.draw_loss(name) for name in LOSSES},
    }
    for address, content in generated.items():
        files.append(File.generated(config, address, content=content))
    paths = [ROOT / paper for paper in PAPERS]
    paths += [path for path in sorted((ROOT / "records").rglob("*")) if path.suffix in (".md", ".png")]
    for path in paths:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, and links that are relative to the repository as links of the site, whose root is docs/."""
    markdown = re.sub(r"^\$\$(.+)\$\$$", lambda found: convert(found[1], display="block"), markdown, flags=re.MULTILINE)
    if page.file.src_uri in PAPERS:
        return markdown.replace("](docs/", "](")
    return re.sub(r"\]\(\.\./((?:\.\./)*(?:records/|CHANGELOG|CONTRIBUTING))", r"](\1", markdown)
