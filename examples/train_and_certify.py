"""Train with interval bounds, certify the network, and show: certified <= exact robust accuracy <= robust under attack.

Here s is not guessed: it is the largest increase of each logit difference that interval arithmetic allows. The same
bound, with slack for rounding, then certifies the network.
"""

from holdfast import FitConfig, Threat, data, evaluate, fit, models
from holdfast.bounds import cheaply_proved
from holdfast.losses import sce
from holdfast.milp import decide, layers_of
from holdfast.objectives import interval, standard

threat = Threat("linf", 0.05)
split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
config = FitConfig(epochs=20, batch_size=64, lr=3e-3)

for name, objective in (("standard", standard(sce)), ("interval bounds", interval(sce, threat))):
    model = models.build("mlp:width=32", split.shape, len(split.classes), mean=mean, std=std)
    fit(model, split.train, split.val, objective, config, val_threat=threat)
    evaluation = evaluate(model, split.test, threat, "quick")
    clean, robust, certified = evaluation.clean, evaluation.robust, evaluation.certified
    assert certified is not None  # a chain of layers with known bounds
    assert not (certified & ~robust).any()  # no certified sample was broken
    between = robust & ~certified
    print(f"{name}: clean {clean.float().mean():.1%}, certified {certified.float().mean():.1%}, "
          f"robust at most {robust.float().mean():.1%}; {int(between.sum())} images in between")  # fmt: skip

# The certificate needs no attack. For a network this small, the exact answer is available for each image.
x, y = data.pixels(split.test.x), split.test.y
print(f"certificate alone: {cheaply_proved(model, x, y, threat).float().mean():.1%}")
rows = between.nonzero()[:5, 0]
print("exact status of five images in between:", decide(layers_of(model), x[rows], y[rows], threat).status)
