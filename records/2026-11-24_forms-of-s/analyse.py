"""The judgement of this record: each frozen form against its control, paired over seeds, Holm over all that was tried.

    python records/2026-11-24_forms-of-s/analyse.py [OUT] [MNIST]      # default: out/forms-of-s, mnist

Reads OUT/confirm-*/results.json and, for l2, the networks themselves: their certificate on the first 5,000 test images
is kept in OUT/certified-5000.json. Prints Markdown (table.md), writes per-seed.csv and frontier.png.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from holdfast import bounds, data, run_folder
from holdfast.results import holm, load, paired_t
from holdfast.threat import Threat

OUT, MNIST = Path(sys.argv[1] if len(sys.argv) > 1 else "out/forms-of-s"), (sys.argv[2:] or ["mnist"])[0]
FIGURES = ("clean", "pgd50", "robust", "certified")


def of_stage(stage: Path) -> dict:
    """(threat, row) -> seed -> figures on [0, 1] and the verdict of the robust one."""
    found = {}
    for run in load(stage).runs:
        figures = {key: getattr(run, key) for key in FIGURES}
        figures = {key: value and value.value for key, value in figures.items()}
        figures["verdict"] = run.verdict.status if run.verdict else ""
        found.setdefault((run.threat_text, run.loss), {})[run.seed] = figures
    return found


def on_5000(stage: Path, found: dict) -> dict:
    """The same with clean and certified accuracy measured on 5,000 test images, under l2 1.58."""
    kept = OUT / "certified-5000.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    test = data.load(MNIST, limit=5000).test
    x, y = data.pixels(test.x), test.y
    for folder in sorted((stage / "runs").iterdir()):
        config = run_folder.read_json(folder / "config.json")
        if folder.name not in known:
            model, _ = run_folder.load(folder)
            with torch.no_grad():
                clean = (model(x).logits.argmax(1) == y).double().mean().item()
            known[folder.name] = [clean, bounds.certify(model, x, y, Threat("l2", 1.58)).double().mean().item()]
            kept.write_text(json.dumps(known))
        clean, certified = known[folder.name]
        found["l2 1.58", config["loss"]][config["fit"]["seed"]] |= {"clean": clean, "certified": certified}
    return found


def at_equal_clean(found: dict, threat: str, form: str, column: str) -> tuple[list[float], list[float]]:
    """Per seed: the form's value, and that of the SCE rows' frontier at its clean accuracy (linear in between)."""
    controls = [row for where, row in found if where == threat and row.startswith("sce")]
    ours, theirs = [], []
    for seed, mine in sorted(found[threat, form].items()):
        points = sorted((found[threat, row][seed]["clean"], found[threat, row][seed][column]) for row in controls)
        ours.append(mine[column])
        theirs.append(float(np.interp(mine["clean"], *zip(*points, strict=True))))
    return ours, theirs


def show(found: dict) -> None:
    """A stage's means as a table."""
    print("| threat | row | clean | PGD-50 | robust | certified | verdicts of robust |")
    print("|---|---|---:|---:|---:|---:|---|")
    for (threat, row), seeds in found.items():
        means = []
        for key in FIGURES:
            values = [one[key] for one in seeds.values()]
            means.append("-" if None in values else f"{100 * np.mean(values):.1f}")
        verdicts = [one["verdict"] for one in seeds.values()]
        told = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
        print(f"| {threat} | `{row}` | {' | '.join(means)} | {told} |")


def draw(found: dict) -> None:
    """frontier.png beside this file: certified and robust accuracy against clean, a dot a seed, SCE joined."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharex=True)
    for ax, column in zip(panels, ("certified", "robust"), strict=True):
        line = []
        for (_, row), seeds in found.items():
            clean, value = (np.array([100 * one[key] for one in seeds.values()]) for key in ("clean", column))
            form = not row.startswith("sce")
            ax.scatter(clean, value, s=9, color="#0072b2" if form else "#6b7684", alpha=0.5)
            name = row.removeprefix("isce:").partition("@")[0] if form else "T = " + row.rpartition("=")[2]
            ax.annotate(name, (clean.mean(), value.mean()), xytext=(5, 4), textcoords="offset points", fontsize=7)
            if not form:
                line.append((clean.mean(), value.mean()))
        ax.plot(*zip(*sorted(line), strict=True), color="#6b7684", linewidth=1)
        ax.set(xlabel="clean accuracy, % (5,000 test images)", ylabel=f"{column} accuracy, %")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "MNIST, l2 1.58: s = Lipschitz bound (blue) against SCE with its temperature swept (grey)", fontsize=9
    )
    figure.savefig(Path(__file__).parent / "frontier.png", dpi=130, metadata={"Software": None})


def family(row: str) -> str:
    """How a row trains: its control is the SCE row of the same family."""
    return next((name for name in ("adversarial", "trades", "interval") if "+" + name in row), "standard")


def tests_of(found: dict, stage: str) -> list[tuple]:
    """(threat, row, what, paired t) of each form against the SCE row of its family; of l2, against SCE's frontier."""
    tests = []
    for threat, row in found:
        if row.startswith("sce"):
            continue
        if stage == "confirm-l2":
            for column in ("certified", "robust"):
                sides = at_equal_clean(found, threat, row, column)
                tests.append((threat, row, f"{column}, over SCE x T at equal clean", paired_t(*sides)))
            continue
        controls = [r for w, r in found if w == threat and r.startswith("sce") and family(r) == family(row)]
        for control in controls:
            for column in ("certified", "robust", "clean") if family(row) == "interval" else ("robust",):
                ours, theirs = (
                    [found[threat, r][seed][column] for seed in sorted(found[threat, row])] for r in (row, control)
                )
                tests.append((threat, row, f"{column}, over `{control}`", paired_t(ours, theirs)))
    return tests


def main() -> None:
    tests, lines, everything = [], [], {}
    for stage in sorted(path.parent for path in OUT.glob("confirm-*/results.json")):
        found = of_stage(stage)
        if stage.name == "confirm-l2":
            found = on_5000(stage, found)
            draw(found)
        everything |= found
        print(f"\n### {stage.name}, {len(next(iter(found.values())))} seeds\n")
        show(found)
        for (threat, row), seeds in found.items():
            for seed, one in seeds.items():
                figures = ["" if one[key] is None else f"{one[key]:.4f}" for key in FIGURES]
                lines.append(f'{stage.name},{threat},"{row}",{seed},{",".join(figures)},{one["verdict"]}')
        tests += tests_of(found, stage.name)
    # The first-order form trains without an attack; what it is up against is training with one, at the same passes.
    attacked = [key for key in everything if key[0] == "linf 0.1" and key[1].startswith("sce+adversarial")]
    for threat, row in everything:
        if "gradient:" in row and attacked:
            ours, theirs = (
                [everything[key][seed]["robust"] for seed in sorted(everything[threat, row])]
                for key in ((threat, row), attacked[0])
            )
            tests.append((threat, row, f"robust, over `{attacked[0][1]}`", paired_t(ours, theirs)))
    head = f"stage,threat,row,seed,{','.join(FIGURES)},verdict"
    (Path(__file__).parent / "per-seed.csv").write_text("\n".join([head, *lines]) + "\n")
    print("\n### Differences in points, 95% t interval over paired seeds, Holm over all of them\n")
    print("| threat | form | what | difference | p | p, Holm |\n|---|---|---|---:|---:|---:|")
    for (threat, row, what, t), adjusted in zip(tests, holm([t.p for *_, t in tests]), strict=True):
        interval = f"{100 * t.difference:+.1f} [{100 * t.low:+.1f}, {100 * t.high:+.1f}]"
        print(f"| {threat} | `{row}` | {what} | {interval} | {t.p:.2g} | {adjusted:.2g} |")


if __name__ == "__main__":
    main()
