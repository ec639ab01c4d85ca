"""report: the page says what the data say, escapes what it shows, and asks nothing of the network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import itertools
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from tests.results.factory import (
    EVIL,
    THREAT,
    make_check,
    make_projection,
    make_region,
    make_results,
    make_run,
    proved,
    with_proofs,
)

from holdfast import report
from holdfast import results as R
from holdfast.errors import UserError
from holdfast.report.render import breakable


class Page(HTMLParser):
    """Text, tags and attributes of a page; complains about tags that do not close."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "circle", "line", "wbr")

    def __init__(self, path):
        super().__init__()
        self.source, self.attributes, self.tags, self.open, self.words = path.read_text(), [], [], [], []
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def page(tmp_path):
    return Page(report.render(make_results(), tmp_path / "report.html"))


def test_the_numbers_are_the_datas(page):
    results = make_results()
    for row in R.rows(results):
        for i in (row.clean, row.pgd50, row.robust):
            assert f"{R.percent(i.low)} to {R.percent(i.high)}" in page.text
            assert R.percent(i.value) in page.text
        status, _, why = row.verdict.partition(": ")
        assert f"robust, {why}: {status}" in page.text  # what was observed first, the word second
    assert "≤ 41.0" in page.text
    assert "isce:s=100: PGD-50 reports 79.0%, but robust accuracy is at most 19.5%." in page.text
    assert "Most robust: isce:s=4.6, at most 41.0% (95% interval 34.1 to 48.2)." in page.text
    beyond = np.mean(np.array(results.runs[1].samples.margin) > 24 * np.log(2))
    assert f"{R.percent(beyond)}% beyond 16.6" in page.text
    for label, names, n in (
        ("threat", "linf 0.1", "200, 1 × 12 × 12"),
        ("seeds", "0", "0.1.0"),
        ("loss", "sce", "2.6"),
    ):
        assert label in page.text
        assert names in page.text
        assert n in page.text
    assert results.command in page.text
    assert "9f2c41d0" in page.text
    for name, n, values in map(dataclasses.astuple, report.per_class(results).classes):
        assert f"{name} {n} {' '.join(R.percent(v) for v in values)}" in page.text


def test_every_section_is_there(page):
    for heading in (
        "Clean, PGD-50, robust",
        "Samples broken by each stage",
        "Margins and the float32 dead zone",
        "Class by class",
        "Adversarial examples",
        "Statistical comparison",
        "Run by run",
        "Reproduce",
    ):
        assert heading in page.text
    assert page.tags.count("svg") == 3
    assert re.search(r"\d → \d", page.text)


def test_it_asks_nothing_of_the_network(page):
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert page.tags.count("script") == 1
    assert "link" not in page.tags
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), value
        assert not name.startswith("on")
    assert "url(" not in re.sub(r"url\(#", "", page.source)
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    only = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{only}'"
    assert ("meta", "content", policy) in page.attributes
    ids = [v for _, k, v in page.attributes if k == "id"]
    used = set(re.findall(r"url\(#([^)]+)\)", page.source)) | {v[1:] for _, k, v in page.attributes if k == "href"}
    assert len(ids) == len(set(ids))
    assert used <= set(ids)


def test_markup_in_names_is_shown_not_obeyed(tmp_path):
    checks = [dataclasses.replace(make_check(EVIL, EVIL, why=EVIL), claims=(EVIL,), source=EVIL, track_record=EVIL)]
    runs = [
        make_run(EVIL, name=EVIL, verdict=R.Verdict("loose", EVIL), checks=checks, train=R.Training(model=EVIL)),
        make_run("$\\frac{", threat={**THREAT, "norm": EVIL}),
    ]
    stages = [dataclasses.replace(s, name=f"{EVIL}{s.name}") for s in runs[0].stages]
    runs[0] = dataclasses.replace(runs[0], stages=stages)
    runs.append(make_run('id="x url(#y'))
    sneaky = dataclasses.replace(runs[0].examples[0], x_png='" onerror="alert(1)')
    runs[0] = dataclasses.replace(runs[0], examples=[sneaky, *runs[0].examples[1:]])
    results = make_results(runs, classes=[EVIL] * 10, command=EVIL, settings={EVIL: EVIL}, environment={"a": [EVIL]})
    results = dataclasses.replace(results, data={**results.data, "name": EVIL})
    page = Page(report.render(results, tmp_path / "report.html"))
    assert page.tags.count("script") == 1
    assert "onerror" not in page.source
    assert page.text.count("<script>alert(1)</script>") > 20
    assert page.text.count('id="x url(#y') >= 5
    assert not any(k.startswith("on") for _, k, _ in page.attributes)
    report.figures(results, tmp_path)


def test_the_same_data_make_the_same_bytes(tmp_path):
    a, b = (report.render(make_results(), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert a == b


def test_figures_are_files(tmp_path):
    written = report.figures(make_results(classes=["α", "日本", "🙂", *"0123456"]), tmp_path / "figures")
    names = ("accuracy", "stages", "margins", "classes")
    pictures = [f"{n}.{form}" for n in names for form in ("svg", "png", "pdf")]
    assert [p.name for p in written] == [*pictures, "captions.md", "table.csv", "table.tex", "table.md"]
    captions = written[len(pictures)].read_text()
    assert re.findall(r"^\*\*(\w+)\*\*", captions, re.M) == list(names)
    assert captions.count("(digits, 200 samples, linf 0.1).") == len(names)
    for path in written[: len(pictures)]:
        if path.suffix == ".svg":
            assert "isce:s=100" in "".join(ET.parse(path).getroot().itertext())
        else:
            assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    assert b"/FontFile2" in written[2].read_bytes()
    again = report.figures(make_results(classes=["α", "日本", "🙂", *"0123456"]), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_several_seeds_are_compared_by_pairs_of_seeds(tmp_path):
    robust = {"sce": (0.38, 0.36, 0.40), "isce:s=1": (0.30, 0.31, 0.33), "mmc": (0.38, 0.36, 0.40)}
    results = make_results([make_run(k, seed=s, robust=v) for k, vs in robust.items() for s, v in enumerate(vs)])
    first, second = R.compare_rows(results)
    expected = R.paired_t(robust["isce:s=1"], robust["sce"])
    assert first.p == pytest.approx(expected.p)
    assert first.p_holm == pytest.approx(2 * expected.p)
    assert (first.low, first.high) == pytest.approx((expected.low, expected.high))
    assert (second.difference, second.p_holm) == (0.0, 1.0)
    page = Page(report.render(results, tmp_path / "r.html"))
    assert "paired t over 3 seeds; fewer than the 8 that a claim needs" in page.text
    assert "mean and 95% t interval over 3 seeds" in page.text
    assert f"{100 * expected.difference:+.1f}".replace("-", "−") in page.text


def test_one_seed_is_compared_on_the_same_samples():
    results = make_results()
    a, b = results.runs[0].samples.robust, results.runs[1].samples.robust
    first = R.compare_rows(results)[0]
    assert first.p == R.mcnemar(b, a)
    assert first.difference == pytest.approx((sum(b) - sum(a)) / 200)
    assert [c.p_holm for c in R.compare_rows(results)] == R.holm([c.p for c in R.compare_rows(results)])


def test_what_cannot_be_compared_says_why():
    moved = make_run("b").samples
    runs = [
        make_run("a"),
        make_run("b", samples=dataclasses.replace(moved, index=[i + 1 for i in moved.index])),
        make_run("c", status="void"),
        make_run("d", samples=None),
        make_run("e", seed=1),
        make_run("e", seed=2),
        make_run("f", threat={**THREAT, "eps": 0.3}),
    ]
    got = R.compare_rows(make_results(runs))
    assert [c.p for c in got] == [None] * 4
    assert [c.label for c in got] == ["b", "c", "d", "e"]
    assert "same samples" in got[0].test
    assert "void" in got[1].test
    assert "two seeds" in got[3].test


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([make_run(pgd50=0.3, robust=0.3)], "No PGD-50 accuracy exceeds the robust accuracy."),
        ([make_run(x, pgd50=0.3, robust=0.3) for x in "ab"], "Most robust: a and b, at most 30.0%"),
        ([make_run(x, robust=0.3) for x in "abcde"] + [make_run("f", robust=0.4)], "Most robust: f, at most 40.0%"),
        ([make_run(x, robust=0.7) for x in "abcde"] + [make_run("f")], "Most robust: 5 of 6 rows alike, at most 70.0%"),
        ([make_run(x, robust=0.7) for x in "abc"] + [make_run("f")], "Most robust: a, b and c, at most 70.0%"),
        ([make_run(pgd50=0.2, robust=0.3)], "No PGD-50 accuracy exceeds"),
        ([make_run("a"), make_run("b", threat={**THREAT, "eps": 0.3})], "Most robust under linf 0.3: b, at most 30.0%"),
        ([make_run(status="void")], "No robust accuracy can be reported: every measurement is void."),
    ],
)
def test_the_finding(runs, says):
    assert says in report.finding(make_results(runs))


@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "mnist"), ("/a/photos", "photos"), ("./photos/", "photos"), ("hf:a/b", "hf:a/b")]
)
def test_data_of_your_own_are_titled_by_their_folder(tmp_path, name, title):
    runs = [make_run(x) for x in "ab"]
    html = report.render(dataclasses.replace(make_results(runs), data={"name": name}), tmp_path).read_text(
        encoding="utf-8"
    )
    assert f"<h1>{title}</h1>" in html


def test_certified_and_robust_are_drawn_as_a_bracket(tmp_path):
    runs = [proved(0.12, make_run(robust=0.41)), make_run("mmc"), proved(None, make_run("center", status="void"))]
    page = Page(report.render(make_results(runs), tmp_path / "r.html"))
    brackets = [v for _, k, v in page.attributes if k == "class" and v == "bracket"]
    ends = [re.fullmatch(r"left:12.0%;width:([\d.]+)%", v) for _, k, v in page.attributes if k == "style"]
    assert len(brackets) == 1
    assert [float(end[1]) for end in ends if end] == [pytest.approx(29)]
    assert "12.0 7.8 to 17.3" in page.text
    assert "at most 41.0% (95% interval 34.1 to 48.2), and 12.0% is certified." in page.text
    assert "var(--certified)" in page.source
    assert "Attack by attack" not in page.text
    assert "the survivors of the earlier ones that are not certified" in page.text
    bare = Page(report.render(make_results(), tmp_path / "bare.html"))
    assert "certified" not in bare.text
    assert not [v for _, k, v in bare.attributes if k == "class" and v == "bracket"]
    nothing = Page(report.render(make_results([proved(0.0, make_run(robust=0.41))]), tmp_path / "nothing.html"))
    assert 'data-name="certified"' not in nothing.source  # the run's own details still say 0.0
    assert "% is certified" not in nothing.text
    assert "certified no sample: the bounds that were computed prove none" in nothing.text
    assert not [v for _, k, v in nothing.attributes if k == "class" and v == "bracket"]
    report.figures(make_results(runs), tmp_path)
    assert "certified" in "".join(ET.parse(tmp_path / "accuracy.svg").getroot().itertext())


def test_what_each_method_proved_is_a_table(tmp_path):
    shown = make_results([with_proofs(), with_proofs(make_run("mmc"), between=0, late=3), make_run("center")])
    text = Page(report.render(shown, tmp_path / "r.html")).text
    assert "loss certified attacked between proved by time" in text
    assert "sce 26.5 30.0 7 linear 27, alpha 26 6.0 s" in text
    assert "mmc 30.0 30.0 0 linear 30, alpha 30 6.0 s" in text
    assert "alpha 30 of 40 proved, time ran out for 3, 1.5 s" in text
    assert "neither broken nor proved 7 of 200 samples" in text
    assert "What is proved" not in Page(report.render(make_results(), tmp_path / "none.html")).text


def test_protocols_have_a_table_of_their_own(tmp_path):
    runs = [proved(None, make_run("<b>", status="loose"), **{"pgd10": 0.55, "<i>x-y": 0.5}), make_run("mmc")]
    page = Page(report.render(make_results(runs), tmp_path / "r.html"))
    assert "Attack by attack" in page.text
    assert "loss clean PGD-50 pgd10 <i>x-y robust, 95% robust verdict <b> 97.0 40.0 55.0 50.0 ≤ 30.0" in page.text
    assert "≤ 30.0 23.7 to 36.9 loose mmc" in page.text
    assert "pgd10 55.0%" in page.text  # run by run


def test_a_void_run_shows_no_robust_number(tmp_path):
    page = Page(report.render(make_results([make_run(status="void")]), tmp_path / "r.html"))
    assert "30.0" not in page.text
    assert "robust: void" in page.text
    assert "→" not in page.text


def test_the_barest_results_render(tmp_path):
    run = make_run(samples=None, stages=[], examples=[], checks=[], cost=None, train=None, verdict=None, seed=None)
    results = R.Results(runs=[run], data={})
    page = Page(report.render(results, tmp_path))
    assert (tmp_path / "report.html").exists()
    assert "not audited" in page.text
    assert {path.name for path in report.figures(results, tmp_path)} == {
        "accuracy.svg", "accuracy.png", "accuracy.pdf", "captions.md", "table.csv", "table.tex", "table.md"
    }  # fmt: skip


def test_files_and_several_results(tmp_path):
    one = make_results([make_run("sce")])
    R.save(one, tmp_path / "one")
    two = make_results([make_run("sce"), make_run("mmc")])
    other = dataclasses.replace(two, data={**two.data, "name": "another set"})
    page = Page(report.render([tmp_path / "one", two, other], tmp_path / "r.html"))
    assert page.tags.count("h1") == 2
    assert page.tags.count("pre") == 3 + 2 * 3  # commands, and each table as LaTeX, CSV and Markdown
    assert page.text.count("Run by run") == 2 * 2  # in the contents, and as heading
    assert page.text.count("sce-seed0") == 2
    with pytest.raises(UserError, match="no runs"):
        report.render([], tmp_path / "r.html")
    with pytest.raises(UserError, match="could not read"):
        report.render(tmp_path / "nowhere", tmp_path / "r.html")


def test_confusion_counts_survivors_on_the_diagonal(tmp_path):
    run = make_run("sce", n=10)
    samples = dataclasses.replace(
        run.samples,
        y=[0, 0, 0, 1, 1, 2, 2, 2, 2, 2],
        prediction_adv=[1, 1, 0, 1, 1, 0, 0, 0, 1, 1],
        robust=[0, 0, 1, 1, 1, 0, 0, 0, 0, 1],  # the last one is robust, whatever its prediction_adv
    )
    results = make_results([dataclasses.replace(run, samples=samples), make_run("mmc")], classes=["a", "<b>", "c"])
    counts = report.confusion(results, R.rows(results)[0])
    assert counts == {(0, 0): 1, (0, 1): 2, (1, 1): 2, (2, 0): 3, (2, 1): 1, (2, 2): 1}
    assert not report.confusion(results, R.rows(results)[1])  # no column
    page = Page(report.render(results, tmp_path / "r.html"))
    assert "Confusion under attack" in page.text
    assert "sce c as a (3), a as <b> (2), c as <b> (1)" in page.text
    assert "Confusion under attack" not in Page(report.render(make_results(), tmp_path / "old.html")).text
    report.figures(results, tmp_path)
    assert (tmp_path / "confusion.png").exists()
    many = make_results([dataclasses.replace(run, samples=samples)], classes=[f"c{i}" for i in range(30)])
    assert "c2 as c0 (3)" in Page(report.render(many, tmp_path / "many.html")).text


def test_a_label_of_any_size_has_a_page(tmp_path):
    """The matrix of all classes up to this one would not fit in memory."""
    run = make_run("sce", n=10)
    samples = dataclasses.replace(run.samples, y=[10**9] * 10, prediction_adv=[7] * 10, robust=[0] * 10)
    results = make_results([dataclasses.replace(run, samples=samples)])
    assert "sce 1000000000 as 7 (10)" in Page(report.render(results, tmp_path / "r.html")).text


def surveyed(run, *, distances=(0.05, 0.15, None, 0.0), s=3.0, auc=0.8, **region):
    """A run with an inference region and a picture of it."""
    index = tuple(range(len(distances)))
    told = make_region(s=s, distances=R.Distances(index, tuple(distances)), two_sample=R.TwoSample(0.01, auc=auc))
    return dataclasses.replace(run, region=dataclasses.replace(told, **region), projection=make_projection(s=s))


def cell_of(runs, measure):
    """A line of the region table."""
    return report.region_table(make_results(runs)).lines[measure]


AUC = "separability of clean and adversarial features, AUC"


def test_the_inference_region_is_shown(tmp_path):
    bare = Page(report.render(make_results(), tmp_path / "bare.html"))
    for heading in ("Accuracy over eps", "The inference region", "Features in two dimensions"):
        assert heading not in bare.text
    runs = [surveyed(make_run("sce")), surveyed(make_run("mmc"), s=None, inference_region=None, auc=0.6)]
    runs[1] = dataclasses.replace(runs[1], projection=make_projection(s=None, grid=None))
    results = make_results([*runs, make_run("center")])
    page = Page(report.render(results, tmp_path / "r.html"))
    for heading in ("Accuracy over eps", "The inference region", "Features in two dimensions"):
        assert heading in page.text
    assert page.tags.count("svg") == 5
    assert "62% of the variance of class centers" in page.text
    table = report.region_table(results)
    assert table.columns == ("sce", "mmc")
    assert table.lines == {
        "distance to the decision boundary, first-order estimate, median": ("0.031", "0.031"),
        "share with 0 < margin ≤ s": ("0.25 → 0.50", "– → 0.50"),
        AUC: ("0.80", "0.60"),
        "MMD²": ("0.010", "0.010"),
    }
    assert f"{AUC} sce 0.031 0.25 → 0.50 0.80 mmc 0.031 – → 0.50 0.60" in page.text.replace("\xa0", " ")
    assert "More measures: 1" in page.text
    assert "is too high" not in page.text


def test_measures_that_decide_stand_first_and_each_row_is_a_line(tmp_path):
    names = [f"isce:s={10 * i}@cosine" for i in range(1, 8)]
    runs = [surveyed(make_run(name)) for name in names]
    page = report.render(make_results(runs), tmp_path / "r.html").read_text()
    tables = re.findall(r'<table class="small region[^>]*>.*?</table>', page, re.S)
    assert [len(re.findall(r'<th class="n">', table)) for table in tables] == [3, 1]
    assert "MMD²" in tables[1]
    for table in tables:
        assert re.findall(r'<tr data-row="([^"]*)">', table) == names


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.1, 0.11, 0.00056), ("0.10", "0.11", "< 0.01")),
        ((3674.0, 12.0, -0.2), ("3,674", "12", "> -1")),
        ((0.0, 0.0), ("0", "0")),
    ],
)
def test_figures_of_one_measure_have_the_same_decimals(values, shown):
    runs = [surveyed(make_run(f"loss{i}"), auc=value) for i, value in enumerate(values)]
    assert cell_of(runs, AUC) == shown


@pytest.mark.parametrize(
    "name", ["isce:s=10", "isce:s=1000000", "cosface:m=0.35,scale=15", "x" * 90, "1" * 90, "sce+ibp:eps=0.1", "<b>&:1"]
)
def test_names_break_between_settings_and_never_inside_a_number(name):
    shown = str(breakable(name))
    assert "<b>" not in shown
    parts = [html.unescape(part) for part in shown.split("<wbr>")]
    plain = "".join(parts).removeprefix('<span class="whole">').removesuffix("</span>")
    assert plain == name
    assert not [1 for a, b in itertools.pairwise(parts) if a[-1] in "0123456789." and b[0] in "0123456789."]
    assert len(parts) > 1 or len(name) <= 16 or name.isdigit()


def test_seeds_share_a_line_of_measures():
    runs = [surveyed(make_run("sce", seed=seed), auc=auc) for seed, auc in enumerate((0.5, 0.7))]
    assert cell_of(runs, AUC) == ("0.60",)


def test_accuracy_over_eps_is_the_share_that_lies_farther(tmp_path):
    runs = [surveyed(make_run("sce", robust=0.5)), surveyed(make_run("l2", threat={**THREAT, "norm": "l2"}))]
    figure = report.draw_eps(make_results(runs))
    assert [ax.get_xlabel() for ax in figure.axes] == ["eps, linf", "eps, l2"]
    line, marks, dot = figure.axes[0].lines
    at, left = line.get_data()
    eps = THREAT["eps"]
    assert at.tolist() == [0, *(d for d in (0.05, 0.15) if d < 2 * eps), 2 * eps]  # 0: one was wrong already
    assert left[:2].tolist() == [75, 50]
    assert left[-1] == (25 if eps > 0.075 else 50)
    assert dot.get_data()[1] == [50]
    shown = report.eps_curves(make_results(runs))[0]
    assert marks.get_ydata().tolist() == [100 * shown.at(at) for at in marks.get_xdata()]


def checked(*counts, eps=THREAT["eps"]):
    """Entries of eps_checks: (minimal_norm, robust) of 256 samples at each radius."""
    shares = (0.5, 1.0, 1.5, 2.0)
    return tuple(R.EpsCheck(share * eps, 256, *pair) for share, pair in zip(shares, counts, strict=True))


def dashes(figure):
    """(from, to, whether dashed) of each part of the first curve."""
    return [(*line.get_xdata()[[0, -1]], line.get_linestyle() != "-") for line in figure.axes[0].lines[:-2]]


def test_a_curve_that_other_attacks_confirm_is_solid(tmp_path):
    run = surveyed(make_run("sce"), eps_checks=checked((220, 220), (130, 129), (40, 38), (0, 0)))
    assert dashes(report.draw_eps(make_results([run]))) == [(0, 0.2, False)]
    assert "did not converge" not in Page(report.render(make_results([run]), tmp_path / "r.html")).text


def test_a_curve_is_dashed_where_the_minimal_norm_attack_did_not_converge(tmp_path):
    checks = checked((220, 220), (130, 129), (120, 4), (2, 2))
    run = surveyed(make_run("<cosface>"), eps_checks=checks, distance=R.Spread(median=0.12))
    results = make_results([run])
    assert dashes(report.draw_eps(results)) == [(0, 0.1, False), (0.1, 0.2, True)]
    page = Page(report.render(results, tmp_path / "r.html"))
    said = (
        "<cosface> : the minimal-norm attack did not converge: at eps 0.15 it leaves 120 of 256 samples unbroken, "
        "other attacks 4; from eps 0.1 to 0.2 the curve may be too high."
    )
    assert said in page.text
    smallest = "smallest perturbation found, median (misclassified: 0)"
    assert cell_of([run], smallest) == ("≤ 0.12",)
    fine = dataclasses.replace(run.region, distance=R.Spread(median=0.08))
    assert cell_of([dataclasses.replace(run, region=fine)], smallest) == ("0.080",)


@pytest.mark.parametrize(
    ("status", "checks", "why"),
    [
        ("loose", checked(*[(9, 9)] * 4), "its robust accuracy is loose"),
        ("tight", (), "no other attack was run at these eps"),
    ],
)
def test_a_curve_is_dashed_throughout_where_its_dot_is_loose_or_nothing_was_checked(status, checks, why, tmp_path):
    run = surveyed(make_run("sce", status=status), eps_checks=checks)
    assert dashes(report.draw_eps(make_results([run]))) == [(0, 0.2, True)]
    assert why in Page(report.render(make_results([run]), tmp_path / "r.html")).text


def test_checks_of_several_seeds_are_counted_together_and_end_where_they_end():
    few = checked((220, 220), (130, 124), (40, 40), (0, 0))  # 6 of 256 are more than 2%, 6 of 512 are not
    none = checked(*[(9, 9)] * 4)
    wide = surveyed(make_run("wide", threat={**THREAT, "eps": 0.2}), eps_checks=checked(*[(9, 9)] * 4, eps=0.2))
    seeds = [surveyed(make_run("sce", seed=i), eps_checks=c) for i, c in enumerate((few, none))]
    assert dashes(report.draw_eps(make_results(seeds))) == [(0, 0.2, False)]
    assert dashes(report.draw_eps(make_results(seeds[:1]))) == [(0, 0.05, False), (0.05, pytest.approx(0.15), True), (
        pytest.approx(0.15), 0.2, False
    )]  # fmt: skip
    curve = report.eps_curves(make_results([seeds[1], wide]))[0]
    assert (curve.is_doubtful(0.15), curve.is_doubtful(0.3)) == (False, True)  # beyond its last radius


def test_a_void_row_has_no_curve_and_what_was_wrong_already_no_step():
    runs = [surveyed(make_run("void", status="void")), surveyed(make_run("sce"), distances=(0.0, 0.0, 0.05, None))]
    figure = report.draw_eps(make_results(runs))
    curve, *_ = figure.axes[0].lines
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["sce, tight at 0.1"]
    assert curve.get_data()[1].tolist()[:2] == [50, 25]
    assert report.draw_eps(make_results(runs[:1])) is None


def test_each_norm_has_a_legend_of_its_own():
    other = surveyed(make_run("sce", threat={**THREAT, "norm": "l2"}))
    figure = report.draw_eps(make_results([surveyed(make_run("sce")), other]))
    assert not figure.legends
    names = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert [len(each) for each in names] == [1, 1]
    assert names[0] != names[1]


def test_one_class_has_no_confusion(tmp_path):
    run = make_run("sce", n=10)
    samples = dataclasses.replace(run.samples, y=[0] * 10, prediction_adv=[0] * 10)
    results = make_results([dataclasses.replace(run, samples=samples)], classes=["a"])
    assert "Confusion under attack" not in Page(report.render(results, tmp_path / "r.html")).text


def test_measures_are_never_written_with_an_exponent_for_their_size():
    runs = [surveyed(make_run(f"loss{i}"), auc=value) for i, value in enumerate((99.4, 99.7, 1234.0))]
    assert cell_of(runs, AUC) == ("99", "100", "1,234")


def test_figures_of_different_data_do_not_overwrite_each_other(tmp_path):
    one = make_results()
    other = dataclasses.replace(one, data={**one.data, "name": "folder/other"})
    written = report.figures([one, other], tmp_path)
    assert len(set(written)) == len(written)
    assert {path.parent.name for path in written} == {"1-digits", "2-folder-other"}


def test_the_cost_stands_in_front(page):
    assert re.search(r"cost of the evaluation [\d.,]+ (million )?passes, \d+ (s|min)", page.text)


def test_margins_that_were_not_finite_and_huge_ones(tmp_path):
    run = make_run(n=10)
    odd = dataclasses.replace(run.samples, margin=[float("nan"), float("inf"), -1e9, 1e12, 0, 1, 5, 20, 200, None])
    assert "finite margin" not in Page(report.render(make_results([run]), tmp_path / "a.html")).text
    page = Page(report.render(make_results([dataclasses.replace(run, samples=odd)]), tmp_path / "b.html"))
    assert "42.9% beyond 16.6, 28.6% beyond 104" in page.text
    assert "3 without a finite margin" in page.text


def test_many_classes_show_the_hardest(tmp_path):
    run = make_run(n=400)
    samples = dataclasses.replace(run.samples, y=[i % 100 for i in range(400)])
    page = Page(report.render(make_results([dataclasses.replace(run, samples=samples)]), tmp_path / "r.html"))
    assert "the 20 lowest of 100 classes" in page.text


def test_ten_thousand_samples_of_eight_losses(tmp_path):
    runs = [make_run(f"loss{'x' * i}", n=10_000, robust=0.1 + 0.02 * i) for i in range(8)]
    heavy = "A" * 400_000
    runs = [dataclasses.replace(r, examples=[dataclasses.replace(e, x_png=heavy) for e in r.examples]) for r in runs]
    runs = [surveyed(r, distances=[0.001 * i for i in range(256)]) for r in runs]
    at = tuple((float(i % 20), i / 10) for i in range(200))
    side, y = tuple(map(float, range(61))), tuple(i % 10 for i in range(200))
    grid = R.DecisionGrid(side, side, tuple((i % 10,) * 61 for i in range(61)), (side,) * 61)
    picture = make_projection(points=at, points_adv=at[::-1], y=y, prediction=y, prediction_adv=y, grid=grid)
    runs = [dataclasses.replace(r, projection=picture) for r in runs]
    column = {"prediction_adv": [i % 10 for i in range(10_000)]}
    runs = [dataclasses.replace(r, samples=dataclasses.replace(r.samples, **column)) for r in runs]
    folder = R.save(make_results(runs), tmp_path).parent
    start = time.process_time()
    path = report.render(folder, tmp_path / "report.html")
    assert time.process_time() - start < 10
    assert path.stat().st_size < 5_000_000
    assert "more are in the results file" in path.read_text()


def test_a_tight_pgd50_accuracy_is_not_called_refuted():
    tight = R.Verdict("tight", "attacks agree")
    run = make_run("sce", pgd50=0.31, robust=0.3)
    runs = [dataclasses.replace(run, pgd50_verdict=tight)]
    assert report.finding(make_results(runs)).startswith("No PGD-50 accuracy is refuted.")
    worse = dataclasses.replace(make_run("mmc", pgd50=0.9, robust=0.3), pgd50_verdict=R.Verdict("refuted", ""))
    assert "mmc: PGD-50 reports 90.0%, but robust accuracy is at most 30.0%." in report.finding(
        make_results([*runs, worse])
    )


def test_the_page_says_what_may_be_claimed_and_against_which_row(tmp_path):
    robust = {"sce": 0.3, "mmc": 0.2}
    results = make_results([make_run(k, seed=s, robust=v + s / 200) for k, v in robust.items() for s in range(8)])
    for baseline in ("sce", "mmc"):
        page = Page(report.render(results, tmp_path / "r.html", baseline))
        (sentence,) = R.significance(results, baseline)
        assert sentence in page.text
    assert "sce is 10.0 points [10.0, 10.0] more robust than mmc" in page.text


def test_latex_of_several_data_sets_is_a_table_each():
    other = dataclasses.replace(make_results([make_run("mmc")]), data={**make_results().data, "name": "mnist"})
    text = report.latex_tables([make_results(), other], "isce:s=100")
    assert text.count(r"\begin{table}") == 2
    assert "to isce:s=100, in points" in text
    assert r"\label{tab:mnist-linf-0-1}" in text
