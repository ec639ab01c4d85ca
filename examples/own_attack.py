"""Add an attack of your own as a stage of the cascade.

It searches corners of the threat model at random: every pixel goes up or down by eps, then some signs are flipped, and
the point with the higher score is kept. It uses no gradient, so it can reveal gradients that mislead other attacks.
"""

from torch import Tensor

from holdfast import FitConfig, Threat, data, evaluate, fit, losses, models, objectives
from holdfast.attacks import ATTACKS, AttackEntry, MostAdversarial, attack
from holdfast.attacks.base import all_rows, predict
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.losses import Loss
from holdfast.noise import Noise
from holdfast.outputs import Model


@attack  # the contract: eval mode, frozen weights, a final projection into the threat model
def corners(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, steps: int = 50, flip: float = 0.1
) -> Tensor:
    """Random search over the corners of the threat model; returns the most adversarial point of each sample."""
    best, rows = MostAdversarial(x, y), all_rows(y)
    sign = noise.sign(x.shape[1:])
    best_score = score(predict(model, threat.project(x + threat.eps * sign, x)), y)
    for step in range(steps):
        flips = noise.fold(step).uniform(x.shape[1:]) < flip
        candidate = sign.where(~flips, -sign)
        x_adv = threat.project(x + threat.eps * candidate, x)
        out = predict(model, x_adv)
        best.update(rows, x_adv, out.logits)
        value = score(out, y)
        better = value > best_score
        best_score = value.where(better, best_score)
        sign = candidate.where(better.view(-1, 1, 1, 1), sign)
    return best.x


ATTACKS["corners"] = AttackEntry(corners, "random search over corners", ("linf",), gradients=False, per_step=1.0)

split = data.load("digits", fold=(0, 5))
mean, std = data.standardisation(split.train)
model = models.build("smallconv", split.shape, len(split.classes), mean=mean, std=std)
fit(model, split.train, split.val, objectives.standard(losses.sce), FitConfig(epochs=10, batch_size=64, lr=3e-3))

mine = Stage("corners", "corners", "margin", settings={"steps": 200})
for name, suite in (("after PGD-50", (mine,)), ("after quick", (*SUITES["quick"], mine))):
    evaluation = evaluate(model, split.test, Threat("linf", 0.1), suite)
    broke = ", ".join(f"{stage.name} broke {stage.broken} of {stage.attacked}" for stage in evaluation.stages[1:])
    print(f"corners {name}: robust at most {evaluation.robust.float().mean():.1%}; {broke}")
