"""A loss of your own, trained and attacked beside SCE.

The hinge below asks for a margin and is then flat. So attacks climb its score, the negative margin, and not the hinge;
the audit says whether an attack on the loss itself would have been blind.
"""

from torch import Tensor

from holdfast import data, losses, models
from holdfast.checks import audit
from holdfast.evaluation import evaluate
from holdfast.objectives import standard
from holdfast.outputs import Outputs
from holdfast.results import mcnemar, proportion
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit


def hinge(out: Outputs | Tensor, y: Tensor, *, width: float = 4.0) -> Tensor:
    """max(0, width - margin)^2: one number per sample, (N,)."""
    return (width + losses.negative_margin(out, y)).clamp_min(0.0).square()


# The line that makes it a loss like all others: what attacks climb, the head it needs, a word on it.
losses.LOSSES["hinge"] = losses.LossEntry(hinge, losses.negative_margin, "linear", "squared hinge on the margin")

split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
threat = Threat("linf", 0.1)
stands = {}
for name in ("sce", "hinge"):
    loss = losses.LOSSES[name].loss
    model = models.build("smallconv", split.shape, len(split.classes), mean=mean, std=std, seed=0)
    fit(model, split.train, split.val, standard(loss), FitConfig(epochs=15, batch_size=64, lr=3e-3))
    found = evaluate(model, split.test, threat, "quick", trained_with=loss)
    judged = audit(model, split.test, found, trained_with=loss)
    stands[name] = judged.evaluation.robust
    robust = proportion(int(stands[name].sum()), len(stands[name]))
    fires = [finding.name for finding in judged.findings if finding.fires]
    print(f"{name}: clean {found.clean.float().mean():.1%}, published {found.pgd50.float().mean():.1%}, "
          f"robust at most {robust.value:.1%} [{robust.low:.1%}, {robust.high:.1%}]; fires: {fires}")  # fmt: skip

# About these two networks, on the same images. About the two losses it says nothing: that takes paired seeds.
p = mcnemar(stands["sce"].tolist(), stands["hinge"].tolist())
print(f"exact McNemar test, these two networks: p = {p:.2g}")
