"""Exact robustness of small ReLU networks under linf, by mixed-integer programming: a truth to measure attacks by.

A sample is robust iff no x_adv of the threat has logit_t >= logit_y for a class t != y (``exact``); by how much a gap
can rise at most is the inference information s* that the min-max problem asks for (``maximize``). Bounds settle much
of it, linear programs some, mixed-integer programs over the unstable ReLUs the rest (Tjeng, Xiao and Tedrake 2019). It
uses no gradient: what hides from gradient attacks does not hide from this.
"""

from __future__ import annotations

from .decide import Exact, decide
from .maximize import WorstLogitDifferences, maximize
from .network import layers_of

__all__ = ["Exact", "WorstLogitDifferences", "decide", "layers_of", "maximize"]
