"""The inference region of a run, as measured: what ``holdfast.region`` returns and results.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


def _same_length(what: str, **columns: Sequence[Any]) -> None:
    """Raise UserError for columns of different lengths."""
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(column)}" for name, column in columns.items())
        raise UserError(f"{what} needs columns of one length: {lengths} entries.")


@dataclass(frozen=True)
class Spread:
    """Quantiles of a measure over samples. Each is the value of one sample; None where it is infinite or missing.

    Attributes:
        q10: the 10% quantile.
        q25: the 25% quantile.
        median: the 50% quantile.
        q75: the 75% quantile.
        q90: the 90% quantile.
    """

    q10: float | None = None
    q25: float | None = None
    median: float | None = None
    q75: float | None = None
    q90: float | None = None


@dataclass(frozen=True)
class Distances:
    """The smallest perturbation found for each sample; each is an upper bound.

    Attributes:
        index: position in the data set.
        distance: in the threat's norm; 0 for a misclassified sample; None where nothing was found.

    Raises:
        UserError: the columns differ in length.
    """

    index: tuple[int, ...]
    distance: tuple[float | None, ...]

    def __post_init__(self) -> None:
        _same_length("distances", index=self.index, distance=self.distance)


@dataclass(frozen=True)
class EpsCheck:
    """Robust accuracy at one radius, by the minimal-norm attack alone and by every attack, in samples.

    Attributes:
        eps: the radius.
        n: number of samples.
        minimal_norm: how many of them are robust at this radius by the minimal-norm attack alone.
        robust: how many are by every attack; where it is smaller, the minimal-norm attack did not converge.
    """

    eps: float
    n: int
    minimal_norm: int
    robust: int


@dataclass(frozen=True)
class FeatureShift:
    """How an attack moves features: spreads of the columns of ``holdfast.region.Movement``, and two shares.

    Attributes:
        moved: distance between a sample's clean and its adversarial features.
        relative: the same over the distance from the own class's center to the nearest other one.
        own_before: distance of the clean features to the center of their own class.
        own_after: the same of the adversarial features.
        other_before: distance of the clean features to the nearest center of another class.
        other_after: the same of the adversarial features.
        strayed_before: share of samples whose clean features are nearer to another class's center; None for one class.
        strayed_after: the same of the adversarial features.
    """

    moved: Spread = Spread()
    relative: Spread = Spread()
    own_before: Spread = Spread()
    own_after: Spread = Spread()
    other_before: Spread = Spread()
    other_after: Spread = Spread()
    strayed_before: float | None = None
    strayed_after: float | None = None


@dataclass(frozen=True)
class TwoSample:
    """How much the clean and the adversarial features differ in distribution. None for fewer than 10 samples.

    Attributes:
        mmd2: squared maximum mean discrepancy; about 0 by chance.
        frechet: squared Frechet distance.
        frechet_chance: the same between two halves of the clean samples. It is above the chance level of ``frechet``,
            since a half has fewer samples.
        frechet_relative: ``frechet`` over the scatter of the clean features, so that their scale does not count.
        auc: area under the ROC curve of a linear classifier; about 0.5 by chance.
    """

    mmd2: float | None = None
    frechet: float | None = None
    frechet_chance: float | None = None
    frechet_relative: float | None = None
    auc: float | None = None


@dataclass(frozen=True)
class TwoSamplePerClass:
    """The figures of ``TwoSample`` within each class: columns with one entry for each class.

    Attributes:
        n: number of samples.
        mmd2: as in ``TwoSample``.
        frechet: as in ``TwoSample``.
        frechet_chance: as in ``TwoSample``.
        auc: as in ``TwoSample``.
    """

    n: tuple[int, ...]
    mmd2: tuple[float | None, ...]
    frechet: tuple[float | None, ...]
    frechet_chance: tuple[float | None, ...]
    auc: tuple[float | None, ...]


@dataclass(frozen=True)
class CalibrationBins:
    """The reliability diagram: bins of equal width over the confidence, lowest first.

    Attributes:
        n: number of samples.
        confidence: their mean confidence; None where the bin is empty.
        accuracy: the share of them that is classified correctly; None where the bin is empty.
    """

    n: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class Reliability:
    """Whether confidence matches accuracy.

    Attributes:
        ece: expected calibration error.
        brier: Brier score.
        nll: negative log-likelihood; None where it is infinite.
        bins: the reliability diagram.
    """

    ece: float | None
    brier: float | None
    nll: float | None
    bins: CalibrationBins


@dataclass(frozen=True)
class Calibration:
    """Calibration without and under attack. None where there are no samples.

    Attributes:
        clean: of the clean images.
        adv: of the adversarial ones.
    """

    clean: Reliability | None
    adv: Reliability | None


@dataclass(frozen=True)
class Passes:
    """What a measurement cost, summed over samples.

    Attributes:
        forwards: forward passes.
        backwards: backward passes.
    """

    forwards: int
    backwards: int

    @property
    def passes(self) -> int:
        """Both together."""
        return self.forwards + self.backwards


@dataclass(frozen=True)
class RegionMeasures:
    """The inference region of a network, and how its features are misaligned under attack.

    A figure is None where there is none. What is measured "over correct samples" leaves out the samples that are
    misclassified without an attack: these have no adversarial example.

    Attributes:
        n: number of samples used.
        right: how many of them are classified correctly.
        not_finite: how many were left out because of NaN or infinity.
        space: what the features are: "features", or "logits" for a model that returns no features.
        dim: their dimension.
        norm: norm of the threat.
        eps: eps of the threat.
        s: the inference information in units of the logits; None where it is not a number.
        margin: logit_y - largest other logit of the clean image.
        margin_adv: the same of the adversarial image.
        inference_region: share of samples with 0 < margin <= s; None without s.
        inference_region_adv: share of samples with 0 < margin_adv <= s; None without s.
        input_margin: first-order distance to the decision boundary, over correct samples.
        distance: smallest perturbation found by any attack; 0 for a misclassified sample; an upper bound.
        distances: the same for each sample. They give robust accuracy over eps.
        lipschitz: a lower bound of the margin's local Lipschitz constant, over correct samples.
        movement: how the attack moves the features, over correct samples.
        scatter: scatter within over between classes of the clean features, over correct samples.
        scatter_adv: the same of the adversarial features.
        two_sample: how much clean and adversarial features differ, over correct samples.
        per_class: the same within each class.
        calibration: whether confidence matches accuracy.
        eps_checks: the distances held against attacks at eps / 2, eps, 3 eps / 2 and 2 eps. Where the minimal-norm
            attack did not converge, the distances between the neighbouring radii may be too large.
        passes: what these measures cost.
    """

    n: int
    right: int
    not_finite: int
    space: str
    dim: int
    norm: str
    eps: float
    s: float | None
    margin: Spread
    margin_adv: Spread
    inference_region: float | None
    inference_region_adv: float | None
    input_margin: Spread
    distance: Spread
    distances: Distances
    lipschitz: Spread
    movement: FeatureShift
    scatter: float | None
    scatter_adv: float | None
    two_sample: TwoSample
    per_class: TwoSamplePerClass
    calibration: Calibration
    eps_checks: tuple[EpsCheck, ...]
    passes: Passes


Point = tuple[float | None, ...]  # [across, up]; None where a coordinate is not finite


@dataclass(frozen=True)
class DecisionGrid:
    """A network's decisions on a grid of a plane.

    Attributes:
        across: coordinates of the columns.
        up: coordinates of the lines.
        prediction: prediction[i][j], the class predicted at (across[j], up[i]).
        margin: margin[i][j], largest logit - second largest there; 0 < margin <= s is the inference region.

    Raises:
        UserError: the grid has another shape than its coordinates say.
    """

    across: tuple[float, ...]
    up: tuple[float, ...]
    prediction: tuple[tuple[int, ...], ...]
    margin: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        _same_length("a grid of decisions", up=self.up, prediction=self.prediction, margin=self.margin)
        for predictions, margins in zip(self.prediction, self.margin, strict=True):
            _same_length("a line of a grid", across=self.across, prediction=predictions, margin=margins)


@dataclass(frozen=True)
class Projection:
    """Clean and adversarial features in a plane, and the network's decisions on that plane.

    Attributes:
        exact: whether the plane is the box of pixels, as for images of two values: decisions are then exact.
        space: what is projected: "pixels", "features" or "logits".
        explained: the share of the scatter between class centers that lies in the plane; None for one class.
        s: the inference information in units of the logits; None where it is not a number.
        classes: number of classes.
        y: the label of each point.
        prediction: the class predicted for each clean image.
        prediction_adv: the same of the adversarial image.
        points: each clean image in the plane.
        points_adv: each adversarial image in the plane.
        centers: the center of each class; None where it does not occur.
        grid: decisions on the plane; None where the head cannot be applied to features alone, as for models that are
            not this package's.

    Raises:
        UserError: columns of different lengths, a point without two coordinates, or a class that does not exist.
    """

    exact: bool
    space: str
    explained: float | None
    s: float | None
    classes: int
    y: tuple[int, ...]
    prediction: tuple[int, ...]
    prediction_adv: tuple[int, ...]
    points: tuple[Point, ...]
    points_adv: tuple[Point, ...]
    centers: tuple[Point | None, ...]
    grid: DecisionGrid | None

    def __post_init__(self) -> None:
        columns = ("y", "prediction", "prediction_adv", "points", "points_adv")
        _same_length("a projection", **{name: getattr(self, name) for name in columns})
        if any(len(point) != 2 for point in (*self.points, *self.points_adv)):
            raise UserError("a projection needs points of two coordinates.")
        lines = () if self.grid is None else self.grid.prediction
        if len(self.centers) != self.classes:
            raise UserError(f"a projection of {self.classes} classes needs as many centers, got {len(self.centers)}.")
        known = {k for line in (self.y, self.prediction, self.prediction_adv, *lines) for k in line}
        if known and not 0 <= min(known) <= max(known) < self.classes:
            raise UserError(f"a projection of {self.classes} classes holds the classes {min(known)} to {max(known)}.")
