"""Print each row's means over seeds, from the results.json of one stage: what the choice is made on."""

import sys
from pathlib import Path

from holdfast.results import load, rows


def percent(interval):
    return "    -" if interval is None else f"{100 * interval.value:5.1f}"


print("clean PGD50 rob.  cert.")
for row in rows(load(Path(sys.argv[1]))):
    print(*map(percent, (row.clean, row.pgd50, row.robust, row.certified)), row.label)
