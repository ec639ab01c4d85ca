"""Bounds of a network over a threat: how far each logit difference can rise, by intervals and by Lipschitz constants.

Randomised smoothing certifies another classifier, the smoothed one, and with a probability: ``certify_smoothed``.

Training and certificates share them. The upper bound of logit_j - logit_y, less its value at x, is the inference
information s that certified training puts into I-SCE; a sample is certified if that upper bound is negative for every
competitor j. To bound another operator, add a line to a table of ``rules.py`` or ``composites.py``; to give another
kind of layer a Lipschitz constant, add a class and a line to ``LAYERS`` in ``layers.py``.
"""

from __future__ import annotations

from .cache import ProofCache
from .certify import METHODS, ROWS, Certified, certify, cheaply_proved, why_not, worst_logit_difference
from .graph import CannotBound
from .interval import box_of, crown_ibp_bounds, interval_growth, logit_difference_bounds
from .lipschitz import l2_radius, lipschitz_constant, lipschitz_s, s_lipschitz_pairwise
from .smoothing import ABSTAIN, Smoothed, certify_smoothed

__all__ = [
    "ABSTAIN",
    "METHODS",
    "ROWS",
    "CannotBound",
    "Certified",
    "ProofCache",
    "Smoothed",
    "box_of",
    "certify",
    "certify_smoothed",
    "cheaply_proved",
    "crown_ibp_bounds",
    "interval_growth",
    "l2_radius",
    "lipschitz_constant",
    "lipschitz_s",
    "logit_difference_bounds",
    "s_lipschitz_pairwise",
    "why_not",
    "worst_logit_difference",
]
