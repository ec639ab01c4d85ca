"""Rows against a baseline: in the CSV, in LaTeX, and in a sentence that claims no more than the seeds allow."""

import csv as csv_module
import dataclasses
import io
import re

import pytest
from tests.results.factory import THREAT, make_results, make_run

from holdfast import results as R
from holdfast.errors import UserError

SCE = (0.30, 0.31, 0.30, 0.32, 0.29, 0.30, 0.31, 0.30)
MORE = (0.35, 0.35, 0.36, 0.37, 0.33, 0.36, 0.35, 0.35)
SAME = (0.31, 0.30, 0.30, 0.31, 0.30, 0.30, 0.30, 0.31)


def over(seeds=8, **more):
    """Results of three losses over paired seeds."""
    rows = {"sce": SCE, "isce:s=3": MORE, "mmc": SAME, **more}
    return make_results(
        [make_run(loss, seed=s, robust=v) for loss, vs in rows.items() for s, v in enumerate(vs[:seeds])]
    )


def test_a_claim_is_a_sentence_with_its_test():
    t, ours = R.paired_t(MORE, SCE), R.compare_rows(over())[0]
    more, same = R.significance(over())
    assert more == (
        f"Over 8 paired seeds, isce:s=3 is {100 * t.difference:.1f} points [{100 * t.low:.1f}, {100 * t.high:.1f}] "
        "more robust than sce under linf 0.1 (paired t, Holm-adjusted p < 0.001)."
    )
    assert ours.p_holm == pytest.approx(2 * t.p)
    assert same.startswith(
        "Over 8 paired seeds, the robust accuracies of mmc and sce under linf 0.1 do not differ signif"
    )
    assert re.search(r": 0\.0 points \[-0\.\d, 0\.\d\] \(paired t, Holm-adjusted p = 1\.000\)\.$", same)


def test_the_baseline_can_be_named():
    fewer, mmc = R.significance(over(), "isce:s=3")
    t = R.paired_t(MORE, SCE)
    assert fewer.startswith(f"Over 8 paired seeds, sce is {100 * t.difference:.1f} points [{100 * t.low:.1f}, ")
    assert "less robust than isce:s=3" in fewer
    assert "less robust than isce:s=3" in mmc
    assert [one.against for one in R.compare_rows(over(), "isce:s=3")] == ["isce:s=3"] * 2
    with pytest.raises(UserError, match=r"unknown baseline 'isc:s=3'.*Did you mean 'isce:s=3'"):
        R.compare_rows(over(), "isc:s=3")


def test_a_threat_without_the_baseline_is_not_compared():
    other = [make_run("mmc", threat={**THREAT, "eps": 0.3}), make_run("lgm", threat={**THREAT, "eps": 0.3})]
    results = make_results([make_run("sce"), make_run("mmc"), *other])
    assert [(one.label, one.against) for one in R.compare_rows(results, "sce")] == [("mmc (linf 0.1)", "sce")]
    assert [one.label for one in R.compare_rows(results, "mmc")] == ["sce", "lgm"]


@pytest.mark.parametrize("seeds", [2, 7])
def test_too_few_seeds_claim_nothing(seeds):
    text = R.significance(over(seeds))[0]
    assert text.startswith(f"Over {seeds} paired seeds, isce:s=3 minus sce is ")
    assert text.endswith("no claim is possible with fewer than 8.")


def test_one_seed_claims_nothing_and_no_comparison_says_nothing():
    (text,) = R.significance(over(1))
    assert text == (
        "One network per row: no claim that one loss is more robust than another is possible; that takes 8 paired "
        "seeds for each."
    )
    assert R.significance(make_results([make_run()])) == []
    assert R.significance(make_results([make_run(), make_run("mmc", status="void")])) == []


def test_a_loose_figure_is_named():
    results = over()
    runs = [dataclasses.replace(r, verdict=R.Verdict("loose", "")) if r.loss == "mmc" else r for r in results.runs]
    more, same = R.significance(dataclasses.replace(results, runs=tuple(runs)))
    assert same.endswith("The figure of mmc is loose: stronger attacks may change the difference.")
    assert "loose" not in more


def test_the_csv_has_the_tests():
    lines = list(csv_module.DictReader(io.StringIO(R.csv(over()))))
    one = R.compare_rows(over())[0]
    assert [lines[0][name] for name in ("against", "difference", "p", "p_holm", "test")] == [""] * 5
    assert lines[1]["against"] == "sce"
    names = ("difference", "difference_low", "difference_high", "p", "p_holm")
    assert [float(lines[1][name]) for name in names] == [one.difference, one.low, one.high, one.p, one.p_holm]
    assert lines[1]["test"] == "paired t over 8 seeds"
    single = list(csv_module.DictReader(io.StringIO(R.csv(over(1), "mmc"))))
    assert (single[0]["against"], single[0]["difference_low"], single[2]["against"]) == ("mmc", "", "")
    assert "against" not in R.csv(make_results([make_run()]))


def test_latex_is_a_whole_table():
    tex = R.latex(over(), "mmc")
    lines = tex.splitlines()
    assert lines[:3] == [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
    assert lines[4:6] == [r"\label{tab:digits-linf-0-1}", r"\begin{tabular}{lrrrlrr}"]
    assert lines[3].startswith(
        r"\caption{digits, 200 samples, linf 0.1, in percent; mean and 95\% t interval over 8 seeds"
    )
    assert lines[3].endswith("difference in robust accuracy to mmc, in points: paired $t$ over 8 seeds.}")
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert {line.count(" & ") for line in lines if line.endswith(r"\\")} == {6}
    t = R.paired_t(MORE, SAME)
    assert f"& $+{100 * t.difference:.1f}$ {{[}}{100 * t.low:.1f}, {100 * t.high:.1f}{{]}} & $< 0.001$" in tex
    assert tex.count("& -- & --") == 1
    assert tex.count("{") == tex.count("}")
    alone = R.latex(make_results([make_run("[x]")]))
    assert "difference" not in alone
    assert "\n{[}x{]} &" in alone
