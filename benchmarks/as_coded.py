"""From the figure that the public code of I-SCE prints to robust accuracy, one change at a time, for trained networks.

    python benchmarks/as_coded.py [--step-size 0.1] [--steps 5] [--limit 200] [--loss isce_c] [RUN ...]

RUN is a run folder that ``holdfast train`` or ``compare`` wrote. Without one, two small networks with batch statistics
are trained on the digits, with reading C and with SCE: 5 minutes on one core. The step size is in pixels of [0, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from holdfast import data
from holdfast.checks import PGD50, ROBUST, Claim, audit, judge
from holdfast.data import Data, standardisation
from holdfast.evaluation import Evaluation, evaluate
from holdfast.evaluation.suites import PGD50 as PGD50_STAGE
from holdfast.experiments.as_coded import CHANGES, Measured, as_coded_waterfall, switched, unprojected
from holdfast.experiments.evaluate_model import from_run
from holdfast.losses import Loss
from holdfast.models import build
from holdfast.objectives import standard
from holdfast.results import proportion
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

TABLE = ((0.005, 5), (0.005, 50), (0.02, 5), (0.02, 50))  # the step sizes and steps that the code was run with


def trained_on_digits(loss: str) -> tuple[nn.Module, Data]:
    """The network as coded, 8 layers deep, trained with its schedule for 8 epochs, and the test digits."""
    split = data.load("digits", val=0.0)
    mean, std = standardisation(split.train)
    model = build("preactresnet:depth=8,statistics=batch", split.shape, len(split.classes), mean=mean, std=std)
    config = FitConfig(epochs=8, batch_size=64, optimizer="sgd", lr=0.1, schedule="step")
    fit(model, split.train, split.val, standard(loss), config, device="cpu")
    return model.eval(), split.test


def networks(runs: list[str], losses: list[str], limit: int) -> Iterator[tuple[str, nn.Module, Data, Loss | str]]:
    for run in runs:
        subject = from_run(run, limit=limit)
        yield run, subject.model, subject.split.test, subject.loss.loss
    for loss in () if runs else losses:
        yield f"digits, {loss}", *trained_on_digits(loss), loss


def percent(correct: int, n: int) -> str:
    i = proportion(correct, n)
    return f"{100 * i.value:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]"


def line(name: str, change: str, figure: Measured) -> str:
    return f"| {name} | {percent(figure.correct, figure.n)} | {figure.linf:.1f} | {figure.l2:.1f} | {change} |"


def printed(model: nn.Module, test: Data, loss: Loss | str) -> Iterator[str]:
    """The code's own step sizes, and beside them robust accuracy in the ball whose radius is the step size."""
    yield "| unprojected | left | linf, 255ths | l2, 255ths | robust in linf eps, running statistics |"
    yield "|---|---:|---:|---:|---:|"
    robust = {}
    for step_size, steps in TABLE:
        if step_size not in robust:
            evaluation = evaluate(switched(model, "running"), test, Threat("linf", step_size), trained_with=loss)
            robust[step_size] = percent(int(evaluation.robust.sum()), len(test))
        figure = unprojected(switched(model, "batch"), test, trained_with=loss, steps=steps, step_size=step_size)
        yield line(f"eps {step_size:g}, {steps} steps", robust[step_size], figure)


def shown(evaluation: Evaluation, model: nn.Module, test: Data, loss: Loss | str) -> Iterator[str]:
    """The suite as-coded on the network with running statistics, and verdicts on it and on its twin."""
    audited = audit(switched(model, "running"), test, evaluation, trained_with=loss)
    after = audited.evaluation.robust
    for name, left in {**evaluation.attack_correct, "robust": after}.items():
        yield f"| {name} | {percent(int(left.sum()), len(left))} |"
    for claim in (Claim(PGD50, evaluation.pgd50.tolist()), Claim(ROBUST, evaluation.robust.tolist())):
        verdict = judge(claim, after.tolist(), audited.findings)
        yield f"{claim.name}: {verdict.status}, {verdict.why}"
    model = switched(model, "batch")
    audited = audit(model, test, evaluate(model, test, evaluation.threat, (PGD50_STAGE,), trained_with=loss))
    claim = Claim(PGD50, audited.evaluation.pgd50.tolist())
    verdict = judge(claim, audited.evaluation.robust.tolist(), audited.findings)
    yield f"{claim.name} with batch statistics: {verdict.status}, {verdict.why}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--step-size", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--loss", action="append", help="for the digits; may be repeated. Default: isce_c and sce.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, model, test, loss in networks(given.runs, given.loss or ["isce_c", "sce"], given.limit):
        test = test.take(slice(0, given.limit)) if given.limit else test
        print(f"\n{name}, {len(test)} images\n")
        for text in printed(model, test, loss):
            print(text, flush=True)
        found, evaluation = as_coded_waterfall(
            model, test, trained_with=loss, steps=given.steps, step_size=given.step_size
        )
        print(
            f"\nball linf {given.step_size:g}, {given.steps} steps\n\n| change | left | linf, 255ths | l2, 255ths | |"
        )
        print("|---|---:|---:|---:|---|")
        for figure in found:
            print(line(figure.name, CHANGES[figure.name], figure))
        print("\n| running statistics, in the ball | left |\n|---|---:|")
        for text in shown(evaluation, model, test, loss):
            print(text, flush=True)


if __name__ == "__main__":
    main()
