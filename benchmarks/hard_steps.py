"""Hard steps on pixels blind gradient attacks; steps with a leak do not: the same training, what each number is worth.

    python benchmarks/hard_steps.py [DATA]          # default: mnist; 3 minutes on one core

Two networks, adversarially trained on 5,400 MNIST images at linf 0.3: one behind clamp(10 (x - 1/2) + 1/2, 0, 1), whose
gradient is zero at most pixels, one behind ``Step``. Attacked on 300 validation images by each suite, checks included.
The last column attacks with the step's gradient taken for 1 (straight through), which a step cannot hide from.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import data, models
from holdfast.checks import audit
from holdfast.data import Data
from holdfast.evaluation import evaluate
from holdfast.losses import sce
from holdfast.models.convnets import Step
from holdfast.objectives import adversarial
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

THREAT = Threat("linf", 0.3)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: nn.Module) -> Tensor:
        return step(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Through(nn.Module):
    """The same step, with the gradient of x."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return _Through.apply(x, self.step)


def stands(model: nn.Module, test: Data, suite: str) -> tuple[float, float, list[str]]:
    """Published and robust accuracy, and what the checks say."""
    found = evaluate(model, test, THREAT, suite, trained_with=sce)
    judged = audit(model, test, found, trained_with=sce)
    told = [finding.why for finding in judged.findings if finding.fires]
    return found.pgd50.double().mean().item(), judged.evaluation.robust.double().mean().item(), told


def main() -> None:
    split = data.load(sys.argv[1] if len(sys.argv) > 1 else "mnist", limit_train=6000, eval_split="val", limit=300)
    for name, leak in (("hard", 0.0), ("leak 0.01", 0.01)):
        model = models.build("stepnet:slope=10,leak=0.01", split.shape, len(split.classes))
        step = model.backbone.layers[0] = Step(10.0, leak)
        objective = adversarial(sce, THREAT, steps=5, ramp=0.3)
        fit(model, split.train, split.val, objective, FitConfig(epochs=6, lr=2e-3), device="cpu")
        open_model = copy.deepcopy(model)
        open_model.backbone.layers[0] = Through(step)
        for suite in ("quick", "standard"):
            published, robust, told = stands(model, split.test, suite)
            said = "; ".join(told) or "no check fires"
            print(f"{name}, {suite}: published {published:.1%}, robust {robust:.1%}; {said}", flush=True)
        print(f"{name}, straight through, quick: robust {stands(open_model, split.test, 'quick')[1]:.1%}", flush=True)


if __name__ == "__main__":
    main()
