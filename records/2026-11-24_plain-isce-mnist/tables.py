"""results.json of the comparison in PLAN.md -> per-seed.csv, table.md and tests.csv beside this file.

python records/2026-11-24_plain-isce-mnist/tables.py out/plain-isce-mnist

For the record of the public code: the same with out/reading-c-mnist, and records/2026-11-29_the-public-code/mnist as
the folder to write to.
"""

import csv
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from holdfast.results import holm, load, over_seeds, paired_t

HERE = Path(sys.argv[2] if len(sys.argv) > 2 else __file__.rpartition("/")[0] or ".")
BASE = "sce"
CONTROL = "sce*100"


def main(folder: str) -> None:
    results = load(folder)
    runs = defaultdict(dict)  # (threat, loss) -> seed -> run
    for run in results.runs:
        runs[run.threat_text, run.loss][run.seed] = run
    per_seed(results.runs)
    tested = tests(runs)
    table(runs, tested, results)


def per_seed(runs) -> None:
    with (HERE / "per-seed.csv").open("w", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        head = "threat,loss,seed,n,train,clean,pgd50,pgd50_train_loss,robust,"
        head += "zero_gradient,zero_gradient_training_loss,input_margin,"
        file.write(f"{head}pgd50_verdict,robust_verdict,remaining,remaining_high\n")
        for r in runs:
            m = r.measures
            write([
                r.threat_text, r.loss, r.seed, r.n, f"{r.train.accuracy:.4f}", f"{r.clean.value:.4f}",
                f"{r.pgd50.value:.4f}", f"{r.attacks['pgd50-train-loss'].value:.4f}",
                "" if r.robust is None else f"{r.robust.value:.4f}",
                f"{m.zero_gradient:.4f}", f"{m.zero_gradient_training_loss:.4f}", f"{m.input_margin:.5f}",
                r.pgd50_verdict.status, r.verdict.status, f"{r.remaining.expected:.2f}", r.remaining.high,
            ])  # fmt: skip


def tests(runs):
    """Paired t of robust accuracy against SCE for every form and threat; Holm over all of them."""
    asked = [(threat, loss) for threat, loss in runs if loss not in (BASE, CONTROL)]
    found = []
    for threat, loss in asked:
        ours, base = runs[threat, loss], runs[threat, BASE]
        seeds = sorted(set(ours) & set(base))
        found.append(paired_t([ours[s].robust.value for s in seeds], [base[s].robust.value for s in seeds]))
    adjusted = holm([t.p for t in found])
    with (HERE / "tests.csv").open("w", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write(["threat", "loss", "difference", "low", "high", "seeds", "p", "p_holm"])
        for (threat, loss), t, p in zip(asked, found, adjusted, strict=True):
            write([threat, loss, *(f"{v:.5f}" for v in (t.difference, t.low, t.high)), t.n, f"{t.p:.3g}", f"{p:.3g}"])
    return dict(zip(asked, zip(found, adjusted, strict=True), strict=True))


def table(runs, tested, results) -> None:
    lines = [f"Made by `tables.py` from `{results.command}`.", ""]
    for threat in dict.fromkeys(threat for threat, _ in runs):
        lines += [
            f"## {threat}", "",
            "| loss | train | clean | PGD-50 | PGD-50, train loss | robust, 95% t | minus SCE | p, Holm | "
            "zero gradient (train loss) | input margin | PGD-50 is | robust is |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
        ]  # fmt: skip
        for (its, loss), seeds in runs.items():
            if its == threat:
                lines.append(row(loss, list(seeds.values()), tested.get((threat, loss))))
        lines.append("")
    (HERE / "table.md").write_text("\n".join(lines))


def row(loss, runs, test) -> str:
    def mean(values) -> str:
        return f"{100 * fmean(values):.1f}"

    robust = over_seeds(r.robust.value for r in runs)
    t, p = test if test else (None, None)
    cells = [
        loss.replace("*", r"\*"),
        mean(r.train.accuracy for r in runs),
        mean(r.clean.value for r in runs),
        mean(r.pgd50.value for r in runs),
        mean(r.attacks["pgd50-train-loss"].value for r in runs),
        f"{100 * robust.value:.1f} [{100 * robust.low:.1f}, {100 * robust.high:.1f}]",
        f"{100 * t.difference:+.1f} [{100 * t.low:+.1f}, {100 * t.high:+.1f}]" if t else "",
        f"{p:.2g}" if t else "",
        mean(r.measures.zero_gradient for r in runs)
        + f" ({mean(r.measures.zero_gradient_training_loss for r in runs)})",
        f"{fmean(r.measures.input_margin for r in runs):.3f}",
        verdicts(r.pgd50_verdict.status for r in runs),
        verdicts(r.verdict.status for r in runs),
    ]
    return "| " + " | ".join(cells) + " |"


def verdicts(found) -> str:
    counted = Counter(found).most_common()
    return counted[0][0] if len(counted) == 1 else ", ".join(f"{name} {times}" for name, times in counted)


if __name__ == "__main__":
    main(sys.argv[1])
