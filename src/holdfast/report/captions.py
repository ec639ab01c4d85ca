"""The captions of the figures: on the page under their headings, and in a file beside the figures, for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from ..results import Results, Row, any_certified, attack_columns
from .figures import DEAD_ALL, DEAD_TRUE

NAMES = {
    "accuracy": "Accuracies of each loss",
    "sweep": "Accuracy over a setting",
    "corruptions": "Accuracy under corruptions",
    "eps": "Accuracy over eps",
    "stages": "Samples broken by each stage of the attacks",
    "margins": "Margins and the float32 dead zone",
    "features": "Features in two dimensions",
    "classes": "Robust accuracy of each class",
    "confusion": "Confusion under attack",
}


def captions(results: Results, shown: Sequence[Row]) -> dict[str, str]:
    """What each figure shows and how to read it: the name of the figure -> sentences."""
    certified, pgd50 = any_certified(shown), any(row.pgd50 for row in shown)
    intervals = "; ".join(dict.fromkeys(row.interval for row in shown))
    exact = any(run.projection is not None and run.projection.exact for run in results.runs)
    grey = ["The grey bar is the part of the PGD-50 accuracy that stronger attacks refuted."] * pgd50
    blue = ["The blue bar spans certified to robust accuracy: the truth lies in it."] * certified
    plane = (
        "The square is the whole input space of an image of two pixels, so the boundaries are exact."
        if exact
        else "The plane runs through the class centers, along the two directions in which they spread most; the "
        "background is the prediction of the network's head on that plane. Points are projected, so a point may appear "
        "on the wrong side of a boundary that it has not crossed."
    )
    return {
        "accuracy": " ".join([f"Lines: {intervals}.", *grey, *blue]),
        "sweep": "Rows that differ in the value of one setting alone. The values stand at equal distances. Bars are "
        "95% intervals: over seeds where there are several, else over samples.",
        "corruptions": "Accuracy on all corrupted images, of each kind at each severity from 1 to 5, in percent. "
        "Nothing is searched for here: these are no upper bounds, but the images of one seed.",
        "eps": "At each eps, the share of samples for which no attack found a perturbation of that size: the "
        "minimal-norm attack (fast minimum norm, 50 steps), the evaluation at its own eps (the filled marker, over all "
        "samples), and short attacks at half, one and a half times and twice that eps; at most 256 samples per "
        "network. Curves and markers are upper bounds. A curve is dashed where it may be too high: there another "
        "attack broke more than the minimal-norm attack, or none was run.",
        "stages": "Each stage attacks only the survivors of the earlier ones"
        + " that are not certified" * certified
        + ", except the attacks whose own accuracy is reported, which attack every correctly classified sample"
        * bool(attack_columns(shown))
        + ". A pass is one forward or backward pass of one sample.",
        "margins": f"At margins above {DEAD_TRUE:.1f} the gradient of F.cross_entropy for the true logit underflows to "
        f"zero in float32, above {DEAD_ALL:.0f} the whole gradient does. An attack on cross-entropy makes no progress "
        "there, however vulnerable the network is.",
        "features": "Colours are classes. A dot is a clean image, joined to a cross, its most adversarial image found: "
        f"at most 120 of the first network of a row, and the first 24 rows. {plane} Where s is a number, the darker "
        "background is the inference region, 0 < margin ≤ s.",
        "classes": "In percent.",
        "confusion": "For each class, the share of its samples that is classified as each other class under attack. "
        "Samples misclassified without an attack are included.",
    }


def captions_text(results: Results, shown: Sequence[Row], kinds: Sequence[str]) -> str:
    """A caption in Markdown for each of these figures, with data and threat, so that it needs no page around it."""
    samples = " or ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in shown))
    threats = ", ".join(dict.fromkeys(row.threat for row in shown))
    about = f"({results.data.get('name', 'data not recorded')}, {samples} samples, {threats})"
    texts = captions(results, shown)
    return "\n".join(f"**{kind}**: {NAMES[kind]} {about}. {texts[kind]}\n" for kind in kinds)
