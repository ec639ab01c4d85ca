"""Train and attack a loss of your own beside SCE.

The hinge below asks for a margin and is flat beyond it. So attacks maximise its score, the negative margin, instead of
the hinge. The audit reports whether an attack on the loss itself would have failed.
"""

from torch import Tensor

from holdfast import FitConfig, Threat, data, evaluate_network, fit, losses, models, objectives
from holdfast.outputs import Outputs
from holdfast.results import mcnemar


def hinge(out: Outputs | Tensor, y: Tensor, *, width: float = 4.0) -> Tensor:
    """max(0, width - margin)^2: one number per sample, (N,)."""
    return (width + losses.negative_margin(out, y)).clamp_min(0.0).square()


# The entry that makes it a loss like all others: the score for attacks, the head it needs, a short description.
losses.LOSSES["hinge"] = losses.LossEntry(hinge, losses.negative_margin, "linear", "squared hinge on the margin")

split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
robust = {}
for name in ("sce", "hinge"):
    loss = losses.LOSSES[name].loss
    model = models.build("smallconv", split.shape, len(split.classes), mean=mean, std=std, seed=0)
    fit(model, split.train, split.val, objectives.standard(loss), FitConfig(epochs=15, batch_size=64, lr=3e-3))
    result = evaluate_network(model, split.test, Threat("linf", 0.1), "quick", trained_with=loss)
    robust[name] = result.evaluation.robust.tolist()
    print(f"{name}: {result}")
    print("checks that fire:", [finding.name for finding in result.audit.findings if finding.fires])

# This compares these two networks on the same images. A statement about the two losses needs paired seeds.
print(f"exact McNemar test, these two networks: p = {mcnemar(robust['sce'], robust['hinge']):.2g}")
