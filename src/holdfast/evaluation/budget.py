"""What an evaluation may cost, as a user writes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import UserError
from ..user_input import number, read_number
from ..user_input import text as checked_text

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """An upper limit on the cost of an evaluation.

    Args:
        passes: forward and backward passes, counted in samples.
        seconds: wall-clock time.

    Raises:
        UserError: a limit that is not a number > 0; infinity is no limit.
    """

    passes: float = math.inf
    seconds: float = math.inf

    def __post_init__(self) -> None:
        for name, value in (("passes", self.passes), ("seconds", self.seconds)):
            if not (isinstance(value, float) and value == math.inf):
                number(f"{name} of a budget", value, above=True, low=0)

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
        match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([a-z]+)\s*", checked_text("a budget", text).lower())
        amount = read_number(match[1]) if match else None
        if match and amount is not None and amount > 0:
            if match[2] in ("pass", "passes"):
                return Budget(passes=float(amount))
            if match[2] in _SECONDS:
                return Budget(seconds=amount * _SECONDS[match[2]])
        raise UserError(f"cannot read the budget '{text}': expected a time or passes, such as 90s, 10min, 1e6passes.")
