"""What an evaluation may cost, as a user writes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import UserError

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """At most so many passes (samples sent forward and gradients sent back), at most so many seconds."""

    passes: float = math.inf
    seconds: float = math.inf

    @staticmethod
    def parse(text: str) -> Budget:
        """A budget from "1e6passes", "90s", "10min" or "2h". Raises UserError for anything else.

        >>> Budget.parse("10min").seconds, Budget.parse("1e6 passes").passes
        (600.0, 1000000.0)
        """
        found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]+)\s*", text.lower())
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        if found and 0 < number < math.inf:
            if found[2] in ("pass", "passes"):
                return Budget(passes=number)
            if found[2] in _SECONDS:
                return Budget(seconds=number * _SECONDS[found[2]])
        raise UserError(f"cannot read the budget '{text}': expected a time or passes, such as 90s, 10min, 1e6passes.")
