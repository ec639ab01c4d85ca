"""What an evaluation may cost, as a user writes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import UserError

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """An upper limit on the cost of an evaluation.

    Args:
        passes: forward and backward passes, counted in samples.
        seconds: wall-clock time.
    """

    passes: float = math.inf
    seconds: float = math.inf

    @staticmethod
    def parse(text: str) -> Budget:
        """A budget from text.

        Args:
            text: a time or a number of passes, such as "90s", "10min", "2h" or "1e6passes".

        Raises:
            UserError: for any other text, and for numbers that are not positive and finite.

        >>> Budget.parse("10min").seconds, Budget.parse("1e6 passes").passes
        (600.0, 1000000.0)
        """
        match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]+)\s*", text.lower())
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            number = math.nan
        if match and 0 < number < math.inf:
            if match[2] in ("pass", "passes"):
                return Budget(passes=number)
            if match[2] in _SECONDS:
                return Budget(seconds=number * _SECONDS[match[2]])
        raise UserError(f"cannot read the budget '{text}': expected a time or passes, such as 90s, 10min, 1e6passes.")
