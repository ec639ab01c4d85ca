"""How far the trust checks can be trusted: false alarms on honest networks, detection against dose on liars.

    python benchmarks/calibrate_checks.py            # resumable; a quarter of an hour on one core
    HOLDFAST_MNIST=data/mnist python benchmarks/calibrate_checks.py      # with networks on MNIST

Writes docs/checks.md, and src/holdfast/checks/calibration.json, which puts each check's record beside its findings.
Thresholds were set by judgement before any network was looked at, and none has been moved since. Should one have to be,
the networks of role "threshold" are there for it; false alarms are counted on those held out.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration_nets  # noqa: E402
from tests.faults.faulty_models import LIARS  # noqa: E402

from holdfast import __version__  # noqa: E402
from holdfast.checks import CHECKS, PGD50, ROBUST, Claim, audit, judge, name_of  # noqa: E402
from holdfast.environment import environment  # noqa: E402
from holdfast.errors import UserError  # noqa: E402
from holdfast.evaluation import evaluate  # noqa: E402
from holdfast.io import write_atomic  # noqa: E402

OUT = ROOT / "out" / "calibration" / "answers.json"
JSON = ROOT / "src" / "holdfast" / "checks" / "calibration.json"
PAGE = ROOT / "docs" / "checks.md"
BASES = ("sce-seed2",)  # the honest networks that the liars wrap; "at0.1-seed2" is there too, at twice the time
SAMPLES = 200


def answer(net: calibration_nets.Net, model: torch.nn.Module) -> dict[str, Any]:
    """Evaluate and audit one model: figures, verdicts, and each check's k of n; or the error it is refused with."""
    data = net.split.test.take(slice(0, SAMPLES))
    try:
        found = evaluate(model, data, net.threat, trained_with=net.loss)
        judged = audit(model, data, found, trained_with=net.loss)
    except (UserError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:160]}"}
    robust = judged.evaluation.robust.tolist()
    left = vars(judged.remaining)
    verdicts = {
        name: judge(Claim(name, stands), robust, judged.findings, left).status
        for name, stands in ((PGD50, found.pgd50.tolist()), (ROBUST, robust))
    }
    share = {name: float(getattr(judged.evaluation, name).double().mean()) for name in ("clean", PGD50, ROBUST)}
    passes = found.forwards + found.backwards, judged.cost.forwards + judged.cost.backwards
    findings = {finding.name: [finding.status, finding.k, finding.n] for finding in judged.findings}
    return {**share, "verdicts": verdicts, "findings": findings, "passes": passes, "remaining": left}


def collect() -> dict[str, Any]:
    """Every answer, by the name of what was asked; what is on disk is not asked again."""
    answers: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    todo: list[tuple[str, Any, Any]] = []
    for data in ("digits", "mnist"):
        if data == "mnist" and calibration_nets.MNIST not in os.environ:
            continue
        for net in calibration_nets.networks("all", data):
            todo.append((f"{data}/{net.role}/{net.name}", net, net.model))
            if data == "digits" and net.name in BASES:
                todo += [
                    (f"{data}/lie/{net.name}/{kind}/{dose:g}", net, (liar, dose))
                    for kind, liar in LIARS.items()
                    for dose in liar.doses
                ]
    for name, net, made in track([one for one in todo if one[0] not in answers], description="networks"):
        model = made if isinstance(made, torch.nn.Module) else made[0].make(copy.deepcopy(net.model), made[1])
        torch.manual_seed(0)
        answers[name] = answer(net, model.eval())
        write_atomic(OUT, json.dumps(answers, indent=0))
    return answers


def fired(found: dict[str, Any]) -> list[str]:
    return [name for name, (status, *_) in found.get("findings", {}).items() if status == "fires"]


def _caught(answers: dict[str, Any]) -> dict[str, list[str]]:
    """Check -> the liars it fires on at some dose that is not harmless, with the doses."""
    caught: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for name, found in answers.items():
        data, role, *rest = name.split("/")
        if role == "lie" and float(rest[2]) not in LIARS[rest[1]].harmless:
            for check in fired(found):
                caught[check][rest[1]].add(float(rest[2]))
        elif role == "liar" and "isce" in name and not name.endswith("s0"):
            for check in fired(found):
                caught[check][f"I-SCE ({data})"].add(float(rest[0].split("-s")[1].split("-")[0]))
    return {
        check: [f"{kind} {', '.join(f'{dose:g}' for dose in sorted(doses))}" for kind, doses in kinds.items()]
        for check, kinds in caught.items()
    }


def honest(answers: dict[str, Any], role: str) -> dict[str, Any]:
    """The answers on the networks of one role."""
    return {name: found for name, found in answers.items() if name.split("/")[1] == role}


def page(answers: dict[str, Any]) -> str:
    """docs/checks.md."""
    held, tuned = honest(answers, "heldout"), honest(answers, "threshold")
    alarms = {name: fired(found) for name, found in held.items() if fired(found)}
    caught, machine = _caught(answers), environment()
    lines = [
        "# Trust checks, and how far they can be trusted",
        "",
        "Made by `benchmarks/calibrate_checks.py`; edit that, not this page. A check fires when the 99% lower bound of",
        "the share of samples that show its fault exceeds its threshold.",
        "",
        f"*Thresholds were set by judgement beforehand; {len(tuned)} honest networks are there to move one on, and",
        f"none has been moved. False alarms are counted on {len(held)} others, held out. {SAMPLES} test images each,",
        f"suite `standard`. holdfast {__version__}, torch {machine['torch']}.*",
        "",
        "## The checks",
        "",
        "| holds of a healthy claim | speaks of | void | proposed by | false alarms | fires on |",
        "|---|---|---|---|---:|---|",
    ]
    for check in CHECKS:
        name = name_of(check)
        false = sum(name in fired(found) for found in held.values())
        on = "; ".join(caught.get(name, ["-"]))
        void = "yes" if check.void else ""
        lines.append(
            f"| {name} | {', '.join(check.claims)} | {void} | {check.source} | {false} of {len(held)} | {on} |"
        )
    lines += ["", f"False alarms on held-out honest networks: {len(alarms)} of {len(held)}.", ""]
    lines += [f"* {name}: {', '.join(names)}" for name, names in alarms.items()]
    lines += ["", "## Detection against dose", ""]
    for base in BASES:
        lines += [f"### Around `{base}` (digits, linf 0.1)", ""]
        lines += ["| liar | dose | clean | published | robust | verdict on published | on robust | what fires |"]
        lines += ["|---|---:|---:|---:|---:|---|---|---|"]
        for kind, liar in LIARS.items():
            for dose in liar.doses:
                found = answers.get(f"digits/lie/{base}/{kind}/{dose:g}")
                mark = " (harmless)" if dose in liar.harmless else ""
                if found:
                    lines.append(f"| {kind} | {dose:g}{mark} | {_row(found)} |")
        lines.append("")
    lines += ["### I-SCE, a liar by training (s is the dose) and the honest networks", ""]
    lines += ["| network | clean | published | robust | verdict on published | on robust | what fires |"]
    lines += ["|---|---:|---:|---:|---|---|---|"]
    for name, found in answers.items():
        if "/lie/" not in name:
            lines.append(f"| {name} | {_row(found)} |")
    return "\n".join([*lines, ""])


def _row(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"- | - | - | refused | refused | {found['error'].replace('|', '/')}"
    figures = " | ".join(f"{100 * found[name]:.1f}" for name in ("clean", PGD50, ROBUST))
    verdicts = f"{found['verdicts'][PGD50]} | {found['verdicts'][ROBUST]}"
    return f"{figures} | {verdicts} | {'; '.join(fired(found)) or '-'}"


def main() -> None:
    torch.set_num_threads(1)
    answers = collect()
    held, caught = honest(answers, "heldout"), _caught(answers)
    record = {
        name_of(check): {
            "honest": len(held),
            "false_alarms": sum(name_of(check) in fired(found) for found in held.values()),
            "caught": caught.get(name_of(check), []),
        }
        for check in CHECKS
    }
    write_atomic(JSON, json.dumps(record, indent=1) + "\n")
    write_atomic(PAGE, page(answers))
    print(f"{PAGE}\n{JSON}")


if __name__ == "__main__":
    main()
