"""Inference information s: its formulas, and the sources that compute it while a network trains."""

from __future__ import annotations

from .formulas import dead_zone, logit_differences, needed_log_odds, s_att, s_cert, s_lipschitz

__all__ = ["dead_zone", "logit_differences", "needed_log_odds", "s_att", "s_cert", "s_lipschitz"]
