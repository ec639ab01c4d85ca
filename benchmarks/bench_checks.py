"""The cost of a verdict: passes of the audit over passes of the evaluation, 1,000 samples, suite `standard`.

    python benchmarks/bench_checks.py [DATA]      # digits, or another name or path, such as data/mnist

Goal: at most 0.15. The audit uses a fixed number of samples, so its share is largest for a short evaluation, of a
network without survivors.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from goals import goal
from holdfast import models
from holdfast.checks import audit
from holdfast.data import Data, default_folds, load, standardisation
from holdfast.evaluation import evaluate
from holdfast.experiments.recipes import fit_for, override
from holdfast.losses import isce, negative_log_odds, sce
from holdfast.objectives import adversarial, standard
from holdfast.threat import Threat
from holdfast.train import fit

GOAL = 0.15


def main(name: str = "digits") -> None:
    torch.set_num_threads(1)
    split = load(name, limit=None if default_folds(name) > 1 else 1000, limit_train=10_000)
    data = split.test
    if len(data) < 1000:  # cross-validated data: the cost does not depend on which images were in training
        data = Data(*(torch.cat([getattr(split.test, k), getattr(split.train, k)])[:1000] for k in ("x", "y", "index")))
    mean, std = standardisation(split.train)
    trained_on_attacks = adversarial(sce, Threat("linf", 0.1), score=negative_log_odds, steps=7)
    for label, loss, schedule, eps in (
        ("SCE", sce, standard(sce), 0.1),
        ("SCE, no survivors", sce, standard(sce), 0.3),
        ("I-SCE s=100", partial(isce, s=100.0), standard(partial(isce, s=100.0)), 0.1),
        ("adversarially trained", sce, trained_on_attacks, 0.1),
    ):
        model = models.build(models.default_model(split.shape), split.shape, len(split.classes), mean=mean, std=std)
        fit(model, split.train, split.val, schedule, override(fit_for(name), epochs=5), device="cpu")
        evaluation = evaluate(model, data, Threat("linf", eps), trained_with=loss)
        audited = audit(model, data, evaluation, trained_with=loss)
        passes, more = evaluation.forwards + evaluation.backwards, audited.cost.forwards + audited.cost.backwards
        robust = float(audited.evaluation.robust.double().mean())
        word = "meets" if more <= GOAL * passes else "misses"
        print(
            f"{label}, linf {eps}: {robust:.1%} robust; evaluation {passes:,} passes in {evaluation.seconds:.1f} s, "
            f"audit {more:,} in {audited.cost.seconds:.1f} s: {more / passes:.3f} ({word} {GOAL})"
        )
        goal(f"passes of the audit over the evaluation's, {label}, linf {eps}", more / passes, GOAL)


if __name__ == "__main__":
    main(*sys.argv[1:])
