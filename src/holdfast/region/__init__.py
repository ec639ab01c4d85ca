"""The inference region: how far decisions are from a mistake, and how clean and adversarial features are misaligned.

I-SCE rests on a claim: between training samples and their adversarial examples lies a region that the network has not
learned, and features are distributed differently there. This package measures it. ``measure`` computes all measures of
a network at once; each measure is also a function of its own. ``projection`` computes what a figure of the features
needs.
"""

from .calibration import reliability
from .distances import EPS_CHECKS, MeasuredDistances, measure_distances, smallest_perturbation
from .feature_shift import Movement, class_centers, movement, scatter_ratio
from .margins import fraction_within, input_margin, local_lipschitz
from .measures import measure, merge, spread
from .misalignment import auc, frechet, median_distance, mmd2, shrunk_covariance
from .projection import Plane, plane, projection
from .samples import choose

VERSION = 3  # of the measures and the projection: a cached result of another version is measured again

__all__ = [
    "EPS_CHECKS", "VERSION", "MeasuredDistances", "Movement", "Plane", "auc", "choose", "class_centers",
    "fraction_within", "frechet", "input_margin", "local_lipschitz", "measure", "measure_distances",
    "median_distance", "merge", "mmd2", "movement", "plane", "projection", "reliability", "scatter_ratio",
    "shrunk_covariance", "smallest_perturbation", "spread",
]  # fmt: skip
