"""All benchmarks in one table: ours, the peer's, the goal, and whether it is met. `make bench` runs this.

    python benchmarks/goals.py [NAME ...]      # such as: epoch loss; all without a name

A benchmark prints its goals by ``goal``, as JSON lines between its own output. One that fails, or that lacks data or a
package, is a line of the table too, with the last line of its output. Exit status 1: a goal is missed, or a benchmark
failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
WIDTH = 150  # of the table, in characters, where there is no terminal


def goal(
    what: str, value: float, limit: float, *, ours: str = "", peer: str = "", unit: str = "", larger: bool = False
) -> None:
    """Print a goal as a JSON line.

    Args:
        what: is measured.
        value: the figure that the goal is about, such as a ratio.
        limit: what it should be at most, or at least with ``larger``.
        ours: our own figure behind it, with its unit.
        peer: the figure and name of what is compared with.
        unit: of value and limit.
        larger: whether a larger value is better.
    """
    met = value >= limit if larger else value <= limit
    line = {"goal": what, "ours": ours, "peer": peer, "value": f"{value:.3g}{unit}", "met": bool(met)}
    print(json.dumps(line | {"limit": f"{'>=' if larger else '<='} {limit:g}{unit}"}), flush=True)


def goals_in(lines: list[str]) -> list[dict[str, Any]]:
    """Those lines that ``goal`` printed.

    >>> goals_in(["fit is fast", "[1]", '{"seconds": 2}', '{"goal": "an epoch", "met": true}'])
    [{'goal': 'an epoch', 'met': True}]
    """
    found = []
    for line in lines:
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict) and "goal" in read:
            found.append(read)
    return found


def run(script: Path) -> tuple[list[str], int]:
    """(the lines that it printed, its exit status); they are shown as they come."""
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            sys.stderr.write(line)
            lines.append(line.rstrip())
    return lines, process.returncode


def main() -> None:
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    unknown = [name for name in sys.argv[1:] if name not in scripts]
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(unknown)}: {', '.join(scripts)}.")
    table, fine = Table("benchmark", "what", "ours", "peer", "measured", "goal", "met"), True
    for name in sys.argv[1:] or scripts:
        print(f"== {name}", file=sys.stderr)
        lines, status = run(scripts[name])
        for one in goals_in(lines):
            fine = fine and one["met"]
            cells = (one[key] for key in ("goal", "ours", "peer", "value", "limit"))
            table.add_row(name, *cells, "yes" if one["met"] else "NO")
        if status:
            fine = False
            table.add_row(name, f"not run to its end: {next((line for line in reversed(lines) if line), '')[:200]}")
        elif not goals_in(lines):
            table.add_row(name, "no goal: see its own output")
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(table)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
