"""The table of results as a pandas frame."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from ..user_input import typed
from .export import csv
from .schema import Results

if TYPE_CHECKING:
    import pandas as pd


@typed
def frame(results: Results) -> pd.DataFrame:
    """The table as a pandas frame; also ``results.frame()``.

    Args:
        results: the results.

    Returns:
        One line for each row of the table, with the columns of ``csv``: proportions in [0, 1], NaN where a figure was
        not measured or is void.
    """
    import pandas as pd  # here, since it takes half a second

    text = csv(results)
    columns = text.partition("\n")[0].split(",")
    words = [name for name in columns if name in ("loss", "threat", "seeds", "interval") or name.endswith("verdict")]
    return pd.read_csv(StringIO(text), dtype=dict.fromkeys(words, str), keep_default_na=False, na_values=[""])
