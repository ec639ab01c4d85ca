"""An attack of your own as a stage of the cascade.

It tries corners of the threat: every pixel all the way up or down, at random, then flips some of the signs and keeps
what is nearer to a mistake. It uses no gradient, so it can say whether gradients were hiding something.
"""

from torch import Tensor

from holdfast import data, losses, models
from holdfast.attacks import ATTACKS, AttackEntry, MostAdversarial, attack
from holdfast.attacks.base import all_rows, predict
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.losses import Loss
from holdfast.noise import Noise
from holdfast.objectives import standard
from holdfast.outputs import Model
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit


@attack  # keeps the contract: eval mode, frozen weights, a last projection into the threat
def corners(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, steps: int = 50, flip: float = 0.1
) -> Tensor:
    """Random search over the corners of the threat; the worst point of each sample."""
    worst, rows = MostAdversarial(x, y), all_rows(y)
    sign = noise.sign(x.shape[1:])
    best = score(predict(model, threat.project(x + threat.eps * sign, x)), y)
    for step in range(steps):
        flips = noise.fold(step).uniform(x.shape[1:]) < flip
        tried = sign.where(~flips, -sign)
        x_adv = threat.project(x + threat.eps * tried, x)
        out = predict(model, x_adv)
        worst.update(rows, x_adv, out.logits)
        value = score(out, y)
        better = value > best
        best = value.where(better, best)
        sign = tried.where(better.view(-1, 1, 1, 1), sign)
    return worst.x


ATTACKS["corners"] = AttackEntry(corners, "random search over corners", ("linf",), gradients=False, per_step=1.0)

split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
model = models.build("smallconv", split.shape, len(split.classes), mean=mean, std=std)
fit(model, split.train, split.val, standard(losses.sce), FitConfig(epochs=10, batch_size=64, lr=3e-3))

mine = Stage("corners", "corners", "margin", settings={"steps": 200})
for name, suite in (("alone", (mine,)), ("after quick", (*SUITES["quick"], mine))):
    found = evaluate(model, split.test, Threat("linf", 0.1), suite)
    broke = ", ".join(f"{stage.name} broke {stage.broken} of {stage.attacked}" for stage in found.stages[1:])
    print(f"corners {name}: robust at most {found.robust.float().mean():.1%}; {broke}")
