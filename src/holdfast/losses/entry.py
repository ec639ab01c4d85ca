"""What holdfast knows of a loss: its function, the score that attacks it, and its head."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Loss


@dataclass(frozen=True)
class LossEntry:
    """One line of LOSSES.

    Args:
        loss: (out, y, **settings) -> (N,).
        score: what attacks maximise.
        head: the key of HEADS that the loss needs, or its default.
        about: one line for users.
        coupled: whether a sample's loss depends on the rest of its batch.
    """

    loss: Loss
    score: Loss
    head: str
    about: str
    coupled: bool = False
