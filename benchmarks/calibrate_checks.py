"""How reliable the trust checks are: false alarms on honest networks, detection on faulty models against severity.

    python benchmarks/calibrate_checks.py            # resumable; a quarter of an hour on one core
    HOLDFAST_MNIST=data/mnist python benchmarks/calibrate_checks.py      # also with networks on MNIST

Writes docs/checks.md and src/holdfast/checks/calibration.json, the track record that is shown with each finding.
Thresholds were set before any network was evaluated and have not been changed since. Networks of the role "threshold"
are reserved for such a change; false alarms are counted on the networks that are held out.
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

from tests.faults import calibration_nets  # noqa: E402
from tests.faults.faulty_models import FAULTY  # noqa: E402

from holdfast import __version__  # noqa: E402
from holdfast.checks import CHECKS, PGD50, ROBUST, audit, name_of  # noqa: E402
from holdfast.environment import environment  # noqa: E402
from holdfast.errors import UserError  # noqa: E402
from holdfast.evaluation import evaluate  # noqa: E402
from holdfast.io import write_atomic  # noqa: E402

OUT = ROOT / "out" / "calibration" / "answers.json"
JSON = ROOT / "src" / "holdfast" / "checks" / "calibration.json"
PAGE = ROOT / "docs" / "checks.md"
BASES = ("sce-seed2",)  # the honest networks that faults are added to; "at0.1-seed2" takes twice the time
SAMPLES = 200
HEADINGS = {PGD50: "PGD-50", ROBUST: "robust"}


def evaluate_and_audit(net: calibration_nets.Net, model: torch.nn.Module) -> dict[str, Any]:
    """Accuracies, verdicts, and each check's k of n for one model; or the error that refuses it."""
    data = net.split.test.take(slice(0, SAMPLES))
    try:
        evaluation = evaluate(model, data, net.threat, trained_with=net.loss)
        audited = audit(model, data, evaluation, trained_with=net.loss)
    except (UserError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:160]}"}
    accuracies = {name: float(getattr(audited.evaluation, name).double().mean()) for name in ("clean", PGD50, ROBUST)}
    return {
        **accuracies,
        "verdicts": {claim: audited.verdict(claim).status for claim in (PGD50, ROBUST)},
        "findings": {finding.name: [finding.status, finding.k, finding.n] for finding in audited.findings},
        "passes": [cost.forwards + cost.backwards for cost in (evaluation, audited.cost)],
        "remaining": vars(audited.remaining),
    }


def collect() -> dict[str, Any]:
    """The result of every model, by name. Results on disk are not computed again."""
    results: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    todo: list[tuple[str, Any, Any]] = []
    for data in ("digits", "moons", "mnist"):
        if data == "mnist" and calibration_nets.MNIST not in os.environ:
            continue
        for net in calibration_nets.networks("all", data):
            todo.append((f"{data}/{net.role}/{net.name}", net, net.model))
            if data == "digits" and net.name in BASES:
                todo += [
                    (f"{data}/fault/{net.name}/{kind}/{severity:g}", net, (fault, severity))
                    for kind, fault in FAULTY.items()
                    for severity in fault.severities
                ]
    for name, net, made in track([one for one in todo if one[0] not in results], description="networks"):
        model = made if isinstance(made, torch.nn.Module) else made[0].make(copy.deepcopy(net.model), made[1])
        torch.manual_seed(0)
        results[name] = evaluate_and_audit(net, model.eval())
        write_atomic(OUT, json.dumps(results, indent=0))
    return results


def firing(result: dict[str, Any]) -> list[str]:
    """The names of the checks that fire."""
    return [name for name, (status, *_) in result.get("findings", {}).items() if status == "fires"]


def _caught(results: dict[str, Any]) -> dict[str, list[str]]:
    """Check -> the faulty models that it detects, each with the severities (harmless ones left out)."""
    caught: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for name, result in results.items():
        data, role, *rest = name.split("/")
        if role == "fault" and float(rest[2]) not in FAULTY[rest[1]].harmless:
            for check in firing(result):
                caught[check][rest[1]].add(float(rest[2]))
        elif role == "faulty" and "isce" in name and not name.endswith("s0"):
            for check in firing(result):
                caught[check][f"I-SCE ({data})"].add(float(rest[0].split("-s")[1].split("-")[0]))
    return {
        check: [
            f"{kind} {', '.join(f'{value:g}' for value in sorted(severities))}" for kind, severities in kinds.items()
        ]
        for check, kinds in caught.items()
    }


def of_role(results: dict[str, Any], role: str) -> dict[str, Any]:
    """The results of the networks of one role."""
    return {name: result for name, result in results.items() if name.split("/")[1] == role}


def page(results: dict[str, Any]) -> str:
    """docs/checks.md."""
    held, tuned = of_role(results, "heldout"), of_role(results, "threshold")
    alarms = {name: firing(result) for name, result in held.items() if firing(result)}
    caught, machine = _caught(results), environment()
    lines = [
        "# Trust checks, and how reliable they are",
        "",
        "*This page is written by `benchmarks/calibrate_checks.py`.*",
        "",
        "The name of each check is a sentence that is true of a sound measurement. The check fires when the 99% lower",
        "confidence bound of the share of samples that violate it exceeds its threshold. A firing check makes the",
        "figures that it applies to `loose`, or `void` where the table says so. Honest networks are networks without a",
        "fault; faulty models are honest networks with a fault added on purpose, at several severities.",
        "",
        f"*Thresholds were set before any network was evaluated. {len(tuned)} honest networks are reserved for",
        f"changing one, and none has been changed. False alarms are counted on {len(held)} other honest networks.",
        f"{SAMPLES} test images each, suite `standard`. holdfast {__version__}, torch {machine['torch']}.*",
        "",
        "## The checks",
        "",
        "| check | applies to | void | proposed by | false alarms | detects (fault and severities) |",
        "|---|---|---|---|---:|---|",
    ]  # fmt: skip
    for check in CHECKS:
        name = name_of(check)
        false = sum(name in firing(result) for result in held.values())
        on = "; ".join(caught.get(name, ["-"]))
        void = "yes" if check.void else ""
        claims = ", ".join(HEADINGS[claim] for claim in check.claims) or "none"
        lines.append(f"| {name} | {claims} | {void} | {check.source} | {false} of {len(held)} | {on} |")
    lines += ["", f"False alarms on held-out honest networks: {len(alarms)} of {len(held)}.", ""]
    lines += [f"* {name}: {', '.join(names)}" for name, names in alarms.items()]
    lines += ["", "## Detection against severity", ""]
    for base in BASES:
        lines += [f"### Faults added to `{base}` (digits, linf 0.1)", ""]
        lines += ["| fault | severity | clean | PGD-50 | robust | verdict on PGD-50 | on robust | checks that fire |"]
        lines += ["|---|---:|---:|---:|---:|---|---|---|"]
        for kind, fault in FAULTY.items():
            for severity in fault.severities:
                result = results.get(f"digits/fault/{base}/{kind}/{severity:g}")
                mark = " (harmless)" if severity in fault.harmless else ""
                if result:
                    lines.append(f"| {kind} | {severity:g}{mark} | {_row(result)} |")
        lines.append("")
    lines += ["### Honest networks, and networks trained with I-SCE (a large s is a fault of training)", ""]
    lines += ["| network | clean | PGD-50 | robust | verdict on PGD-50 | on robust | checks that fire |"]
    lines += ["|---|---:|---:|---:|---|---|---|"]
    for name, result in results.items():
        if "/fault/" not in name:
            lines.append(f"| {name.replace('/faulty/', '/isce/')} | {_row(result)} |")
    return "\n".join([*lines, ""])


def _row(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"- | - | - | refused | refused | {result['error'].replace('|', '/')}"
    accuracies = " | ".join(f"{100 * result[name]:.1f}" for name in ("clean", PGD50, ROBUST))
    verdicts = f"{result['verdicts'][PGD50]} | {result['verdicts'][ROBUST]}"
    return f"{accuracies} | {verdicts} | {'; '.join(firing(result)) or '-'}"


def main() -> None:
    torch.set_num_threads(1)
    results = collect()
    held, caught = of_role(results, "heldout"), _caught(results)
    track_record = {
        name_of(check): {
            "honest": len(held),
            "false_alarms": sum(name_of(check) in firing(result) for result in held.values()),
            "caught": caught.get(name_of(check), []),
        }
        for check in CHECKS
    }
    write_atomic(JSON, json.dumps(track_record, indent=1) + "\n")
    write_atomic(PAGE, page(results))
    print(f"{PAGE}\n{JSON}")


if __name__ == "__main__":
    main()
