"""Exact robustness of small ReLU networks under linf by mixed-integer programming: the truth to measure attacks by.

``decide`` says of each sample whether some x_adv of the threat has logit_t >= logit_y for a class t != y. ``maximize``
gives the largest value of each logit difference over the threat, and so the inference information s* of the min-max
problem. Bounds settle most of it, linear programs a part of the rest, and mixed-integer programs over the unstable
ReLUs what remains (Tjeng, Xiao and Tedrake 2019). No gradient is used, so gradient masking does not affect the answer.
"""

from __future__ import annotations

from .decide import Decision, decide
from .maximize import WorstLogitDifferences, maximize
from .network import layers_of

__all__ = ["Decision", "WorstLogitDifferences", "decide", "layers_of", "maximize"]
