"""The inference region: how far decisions stand from mistakes, and how clean and adversarial features are misaligned.

I-SCE rests on a claim: between training samples and their adversarial twins lies a region that a network has not
learned, where features are distributed differently. Here it is measured. ``measure`` asks a network for all of it at
once; each measure is a function of its own; ``picture`` is what a figure needs.
"""

from .calibration import reliability
from .feature_shift import Movement, class_centers, movement, scatter_ratio
from .margins import input_margin, local_lipschitz, share_within, smallest
from .measures import measure, merge, spread
from .misalignment import auc, frechet, median_distance, mmd2, shrunk_covariance
from .projection import picture, plane
from .samples import choose

VERSION = 1  # of the measures and the picture: what was measured by another is measured again

__all__ = [
    "VERSION", "Movement", "auc", "choose", "class_centers", "frechet", "input_margin", "local_lipschitz", "measure",
    "median_distance", "merge", "mmd2", "movement", "picture", "plane", "reliability", "scatter_ratio", "share_within",
    "shrunk_covariance", "smallest", "spread",
]  # fmt: skip
