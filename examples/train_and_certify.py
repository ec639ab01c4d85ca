"""Train on a bound, certify, and see the bracket: certified <= truth <= robust.

s is not guessed here: it is what interval arithmetic says that the threat can add to each wrong class's lead. The same
bound, with slack for rounding, then certifies the network.
"""

from holdfast import data, models
from holdfast.bounds import certify
from holdfast.evaluation import evaluate
from holdfast.losses import sce
from holdfast.milp import decide, layers_of
from holdfast.objectives import interval, standard
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

threat = Threat("linf", 0.05)
split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
config = FitConfig(epochs=20, batch_size=64, lr=3e-3)

for name, objective in (("plain", standard(sce)), ("on bounds", interval(sce, threat))):
    model = models.build("mlp:width=32", split.shape, len(split.classes), mean=mean, std=std)
    fit(model, split.train, split.val, objective, config, val_threat=threat)
    found = evaluate(model, split.test, threat, "quick")
    assert found.certified is not None  # a chain of layers that bounds are known for
    assert not (found.certified & ~found.robust).any()  # nothing proved was ever broken
    between = found.robust & ~found.certified
    print(f"{name}: clean {found.clean.float().mean():.1%}, certified {found.certified.float().mean():.1%}, "
          f"robust at most {found.robust.float().mean():.1%}; {int(between.sum())} images in between")  # fmt: skip

# The certificate alone needs no attack. And a network this small can be asked for the truth, image by image.
x, y = data.pixels(split.test.x), split.test.y
print(f"by the certificate alone: {certify(model, x, y, threat).float().mean():.1%}")
rows = between.nonzero()[:5, 0]
print(
    "five that are neither proved nor broken are in truth:", decide(layers_of(model), x[rows], y[rows], threat).status
)
