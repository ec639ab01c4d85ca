"""results: intervals, tests, JSON and tables."""

from __future__ import annotations

import csv as csv_module
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from tests.results.factory import (
    PROTOCOLS,
    THREAT,
    make_projection,
    make_region,
    make_results,
    make_run,
    proved,
    with_proofs,
)

from holdfast import results as R
from holdfast.errors import UserError

# --- intervals and tests


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_is_scipys(kn):
    k, n = kn
    ours, theirs = R.proportion(k, n), stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert ours.value == k / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_over_seeds_is_the_t_interval():
    x = [0.31, 0.28, 0.35, 0.30]
    ours, theirs = R.over_seeds(x), stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert R.over_seeds([0.0, 1.0]) == R.Interval(0.5, 0.0, 1.0)
    assert R.over_seeds([0.1] * 3) == R.Interval(0.1, 0.1, 0.1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_binomial_test(pairs):
    a, b = zip(*pairs, strict=True)
    m, k = sum(p != q for p, q in pairs), sum(p and not q for p, q in pairs)
    assert R.mcnemar(a, b) == pytest.approx(stats.binomtest(k, m).pvalue if m else 1.0)
    assert R.mcnemar(a, b) == R.mcnemar(b, a)


def test_paired_t_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.random(9), rng.random(9)
    ours, theirs = R.paired_t(a, b), stats.ttest_rel(a, b)
    ci = theirs.confidence_interval(0.95)
    assert (ours.p, ours.low, ours.high) == pytest.approx((theirs.pvalue, ci.low, ci.high))
    assert R.paired_t([0.5, 0.6], [0.4, 0.5]).p == 0.0
    assert R.paired_t([0.5, 0.6], [0.5, 0.6]).p == 1.0


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_orders_and_never_shrinks(ps):
    adjusted = R.holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.permutations(range(len(ps)), 2) if ps[i] < ps[j])


@pytest.mark.parametrize(
    "call",
    [
        lambda: R.proportion(3, 2),
        lambda: R.proportion(0, 0),
        lambda: R.over_seeds([]),
        lambda: R.over_seeds([1.2]),
        lambda: R.over_seeds([float("nan")]),
        lambda: R.mcnemar([1], []),
        lambda: R.paired_t([1], [1]),
        lambda: R.Interval(0.5, 0.6, 0.7),
        lambda: R.Interval(float("nan"), 0.0, 1.0),
        lambda: R.Samples([1], [1], [1], [1], [1], [], [1], [0.0], [0.0]),
        lambda: make_run(n=20, samples=make_run(n=10).samples),
        lambda: make_run(threat={"norm": "l2", "eps": 1, "lo": 0}),
        lambda: make_run(pgd50_n=201),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(UserError):
        call()


# --- JSON

number = st.floats(allow_nan=False, allow_infinity=False)
scalar = st.none() | st.booleans() | st.integers() | number | st.text(max_size=8)
plain = st.recursive(
    scalar, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=6
)
bag = st.dictionaries(st.text(max_size=6), plain, max_size=3)
interval = st.tuples(*[st.floats(0, 1)] * 3).map(lambda t: R.Interval(sorted(t)[1], sorted(t)[0], sorted(t)[2]))
text, count = st.text(max_size=12), st.integers(0, 10**9)
column = {name: st.integers(-2, 10**6) for name in ("index", "y", "prediction", "clean", "pgd50", "robust", "stage")}
margin = st.none() | st.floats()
samples_of = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        R.Samples,
        **{
            k: st.lists(v, min_size=n, max_size=n)
            for k, v in {**column, "margin": margin, "margin_adv": margin}.items()
        },
        certified=st.none() | st.lists(st.integers(0, 1), min_size=n, max_size=n),
    )
)
claims = st.lists(text, max_size=2).map(tuple)
check = st.builds(R.CheckResult, text, text, count, count, number, text, st.booleans(), claims, text, st.booleans())
spot_checks = st.lists(st.builds(R.SpotCheck, count, count, count, count, count), max_size=2).map(tuple)
remaining = st.builds(R.Remaining, *[number] * 3, *[count] * 5, spot_checks, st.booleans(), st.integers(1, 1000))
eps = st.floats(0, 10, exclude_min=True)
threat = st.fixed_dictionaries({"norm": text, "eps": eps, "lo": st.floats(-9, 0), "hi": st.floats(1, 9)})
run = samples_of.flatmap(
    lambda s: st.builds(
        R.Run,
        name=text,
        loss=text,
        seed=st.none() | count,
        threat=threat,
        n=st.just(len(s)),
        clean=interval,
        attacks=st.dictionaries(text, interval, max_size=2).flatmap(
            lambda others: interval.map(lambda pgd50: {"pgd50": pgd50, **others})
        ),
        robust=st.none() | interval,
        verdict=st.none() | st.builds(R.Verdict, text, text),
        checks=st.lists(check, max_size=2),
        remaining=st.none() | remaining,
        cost=st.none() | st.builds(R.Cost, count, count, number),
        samples=st.sampled_from([None, s]),
        train=st.none() | st.builds(R.Training, epochs=st.none() | count, seconds=st.none() | number, model=text),
        region=st.none() | st.builds(make_region, s=st.none() | number, inference_region=st.none() | number),
        projection=st.none() | st.builds(make_projection, explained=st.none() | number, space=text),
        interval=text,
        stages=st.lists(st.builds(R.StageCost, text, count, count, count, count, number), max_size=2),
        certified=st.none() | interval,
        examples=st.lists(st.builds(R.Example, count, count, count, count, text, text, text), max_size=2),
    )
)
anything = st.builds(
    R.Results,
    runs=st.lists(run, max_size=3),
    data=bag,
    command=text,
    settings=bag,
    environment=bag,
    created=text,
    holdfast=text,
)


@given(anything)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_nothing_is_lost(tmp_path, results):
    assert R.load(R.save(results, tmp_path)) == results


def kinds_below(kind):
    """The dataclasses of a results file."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for below in typing.get_type_hints(kind).values():
            yield from kinds_below(below)
    for argument in typing.get_args(kind):
        yield from kinds_below(argument)


def test_json_is_what_the_page_says(tmp_path):
    path = R.save(make_results(), tmp_path / "new" / "folder")
    raw = json.loads(path.read_text())
    assert path.name == "results.json"
    assert raw["schema"] == R.SCHEMA == 6
    first = raw["runs"][0]
    assert set(first["clean"]) == set(first["attacks"]["pgd50"]) == set(first["robust"]) == {"value", "low", "high"}
    assert first["threat"] == THREAT
    assert first["verdict"] == {"status": "tight", "why": "attacks of three kinds agree"}
    described = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text()
    for kind in kinds_below(R.Results):
        for f in dataclasses.fields(kind):
            assert f"`{f.name}`" in described, f"docs/results-schema.md does not describe {kind.__name__}.{f.name}"
    assert R.load(tmp_path / "new" / "folder") == R.load(path) == make_results()


def test_a_small_file_by_hand_loads(tmp_path):
    i = {"value": 0.5, "low": 0.4, "high": 0.6}
    run = {"name": "a", "loss": "sce", "seed": 0, "threat": THREAT, "n": 10, "clean": i, "robust": None}
    run["attacks"] = {"pgd50": i}
    (tmp_path / "results.json").write_text(json.dumps({"schema": 4, "runs": [run], "data": {}}))
    assert R.load(tmp_path).runs[0].robust is None
    assert R.load(tmp_path).runs[0].pgd50 == R.Interval(0.5, 0.4, 0.6)


def test_an_older_file_without_methods_of_proof_loads(tmp_path):
    raw = json.loads(R.to_json(make_results([with_proofs()])))
    run = raw["runs"][0]
    del run["proofs"], run["samples"]["proved_by"]
    (tmp_path / "results.json").write_text(json.dumps({**raw, "schema": 4}))
    old = R.load(tmp_path)
    assert (old.schema, old.runs[0].proofs, old.runs[0].samples.proved_by) == (R.SCHEMA, (), None)
    assert R.bracket_text(old).endswith("7 of 200 samples lie between.")
    assert R.load(R.save(old, tmp_path / "again")) == old


def sampled(run, asked):
    """The run with PGD-50 on its first samples only; with none of them, without PGD-50."""
    column = tuple(one if i < asked else None for i, one in enumerate(run.samples.pgd50)) if asked else None
    attacks = {"pgd50": R.proportion(sum(column[:asked]), asked)} if asked else {}
    verdict = R.Verdict("tight", "agrees") if asked else None
    samples = dataclasses.replace(run.samples, pgd50=column)
    return dataclasses.replace(
        run, attacks=attacks, samples=samples, pgd50_n=asked or None, pgd50_verdict=verdict, verdict=R.Verdict("tight")
    )


def test_pgd50_on_a_sample_says_how_many(tmp_path):
    whole = make_results([sampled(make_run(), 50)])
    assert R.load(R.save(whole, tmp_path)) == whole
    (row,) = R.rows(whole)
    column = whole.runs[0].samples.pgd50[:50]
    assert (row.pgd50_n, row.pgd50.value) == (50, sum(column) / 50)
    robust = whole.runs[0].samples.robust[:50]
    assert row.pgd50_excess.value == sum(p and not r for p, r in zip(column, robust, strict=True)) / 50
    assert R.markdown(whole).startswith("| loss | clean | PGD-50, n=50 | PGD-50 verdict |")
    table = list(csv_module.DictReader(R.csv(whole).splitlines()))
    assert (table[0]["pgd50_n"], table[0]["n"]) == ("50", "200")


def test_pgd50_left_out_has_no_column(tmp_path):
    whole = make_results([sampled(make_run(), 0)])
    assert R.load(R.save(whole, tmp_path)) == whole
    assert R.markdown(whole).startswith("| loss | clean | robust, 95% | robust verdict |")
    table = list(csv_module.DictReader(R.csv(whole).splitlines()))
    assert (table[0]["pgd50"], table[0]["pgd50_verdict"]) == ("", "")
    assert "pgd50_n" not in table[0]
    assert R.doubts(whole) == []
    mixed = make_results([make_run(), sampled(make_run("mmc"), 0)])
    assert R.markdown(mixed).splitlines()[-1].split("|")[3].strip() == "-"


def test_a_method_of_proof_that_there_is_not_is_refused(tmp_path):
    run = with_proofs()
    assert R.load(R.save(make_results([run]), tmp_path)).runs[0] == run
    with pytest.raises(UserError, match=r"unknown method of proof 'crwn'\. Did you mean 'crown'"):
        R.ProofCost("crwn", 1, 1, 0.0)
    raw = json.loads((tmp_path / "results.json").read_text())
    raw["runs"][0]["samples"]["proved_by"][3] = "crwn"
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="'proved_by' 'crwn'"):
        R.load(tmp_path)


def test_a_check_of_an_older_file_makes_no_proof_vacuous(tmp_path):
    path = R.save(make_results(), tmp_path)
    raw = json.loads(path.read_text())
    for check in raw["runs"][0]["checks"]:
        del check["vacuous"]
    path.write_text(json.dumps(raw))
    assert R.load(path) == make_results()


def test_arrays_and_numpy_scalars_become_plain(tmp_path):
    run = make_run(cost=R.Cost(np.int64(7), np.int64(5), np.float32(0.5)))
    got = R.load(R.save(make_results([run]), tmp_path)).runs[0]
    assert got.cost == R.Cost(7, 5, 0.5)
    assert type(got.samples.clean[0]) is int


@pytest.mark.parametrize(
    ("part", "where", "value", "message"),
    [
        ("region", (), {}, r"runs\[0\]\.region\.\w+ is missing"),
        ("region", ("missed",), 0, "region has the field 'missed'"),
        ("region", ("n",), "4", r"region\.n should be int"),
        ("region", ("two_sample", "auc"), [], r"region\.two_sample\.auc should be float"),
        ("region", ("distances", "index"), [0], "distances needs columns of one length"),
        ("region", ("eps_checks",), [{"eps": 0.1, "n": 4, "robust": 2}], r"eps_checks\[0\]\.minimal_norm is missing"),
        ("projection", ("y",), [0, 1], "a projection needs columns of one length"),
        ("projection", ("prediction",), [0, 1, 2, 10], "holds the classes 0 to 10"),
        ("projection", ("classes",), 10**9, "needs as many centers, got 10"),
        ("projection", ("points",), [[0.0, 1.0]] * 3 + [[0.0]], "points of two coordinates"),
        ("projection", ("grid", "margin"), [[1.0, 1.0, 1.0]], "a grid of decisions needs columns of one length"),
        ("projection", ("grid", "prediction"), [[0], [0]], "a line of a grid needs columns of one length"),
        ("measures", (), {"zero_gradient": 0.5}, r"measures\.\w+ is missing"),
        ("cost", ("seconds",), None, r"cost\.seconds should be float"),
        ("train", ("epoch",), 3, "train has the field 'epoch'"),
    ],
)
def test_every_field_of_the_measures_is_checked(part, where, value, message, tmp_path):
    raw = json.loads(R.to_json(make_results([make_run(region=make_region(), projection=make_projection())])))
    place = raw["runs"][0]
    for key in (part, *where)[:-1]:
        place = place[key]
    place[(part, *where)[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        R.load(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1: 2}, object()])
def test_what_json_cannot_hold_is_named_and_the_old_file_stays(tmp_path, bad):
    R.save(make_results(), tmp_path)
    with pytest.raises(UserError, match=r"runs\[0\]\.train\.accuracy"):
        R.save(make_results([make_run(train=R.Training(accuracy=bad))]), tmp_path)
    assert R.load(tmp_path) == make_results()


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, where):
    R.save(make_results(), tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, where, full)
        with pytest.raises(UserError, match="No space left"):
            R.save(make_results([make_run()]), tmp_path)
    assert R.load(tmp_path) == make_results()
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        R.save(make_results(), tmp_path / "file")


def _without(*keys):
    def edit(raw):
        inner = raw
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return edit


def _with(value, *keys):
    def edit(raw):
        inner = raw
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_with(7, "schema"), "written by a newer holdfast: schema 7, this one reads 6"),
        (_without("schema"), "not a holdfast results file"),
        (_without("runs"), "not a holdfast results file"),
        (_without("data"), "results.data is missing"),
        (_without("runs", 0, "attacks"), r"results.runs\[0\].attacks is missing"),
        (_with(0, "runs", 0, "pgd50_n"), "pgd50_n must be 1 to 10 samples, got 0"),
        (_without("runs", 0, "samples", "pgd50"), "samples.pgd50 is missing"),
        (_without("runs", 0, "clean", "low"), r"results.runs\[0\].clean.low is missing"),
        (_without("runs", 0, "threat", "eps"), "'eps' is missing"),
        (_without("runs", 0, "samples", "stage"), "samples.stage is missing"),
        (_with("many", "runs", 0, "n"), r"results.runs\[0\].n should be int, got str"),
        (_with([1.5], "runs", 0, "samples", "y"), r"samples.y\[0\] should be int"),
        (_with([1], "runs", 0, "samples", "certified"), "Samples column 'certified' has 1 entries"),
        (_with({"cw": 0.5}, "runs", 0, "attacks"), r"attacks.cw should be an object"),
        (_with([], "runs", 0, "attacks"), r"attacks should be dict"),
        (_with([], "runs", 0, "clean"), "should be an object"),
        (_with(7, "runs"), "should be tuple"),
        (_with(1.5, "runs", 0, "clean", "value"), "low <= value"),
        (_with(1, "runs", 0, "novelty"), "'novelty', which this holdfast does not know"),
    ],
)
def test_load_says_what_is_wrong(tmp_path, edit, says):
    raw = json.loads(R.save(make_results([make_run(n=10)]), tmp_path).read_text())
    edit(raw)
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=says):
        R.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": NaN}', b"[" * 100_000, b"[1]", b"null"])
def test_load_refuses_what_is_no_results_file(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=r"not readable JSON|not a holdfast"):
        R.load(tmp_path)


def test_load_says_what_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"could not read .*No such file"):
        R.load(tmp_path / "nowhere.json")


# --- rows and tables


def test_rows_merge_seeds():
    runs = [make_run("sce", seed=s, robust=r) for s, r in ((0, 0.30), (1, 0.34), (2, 0.35))] + [make_run("isce:s=1")]
    merged, single = R.rows(make_results(runs))
    assert (merged.label, merged.seeds, merged.n, merged.runs) == ("sce", (0, 1, 2), 200, (0, 1, 2))
    assert merged.robust == R.over_seeds(r.robust.value for r in runs[:3])
    assert merged.interval == "mean and 95% t interval over 3 seeds"
    assert single.robust == runs[3].robust == R.proportion(60, 200)


def test_rows_do_not_average_different_experiments():
    other = {**THREAT, "eps": 0.2}
    runs = [make_run(), make_run(name="trained longer"), make_run(threat=other), make_run("mmc"), make_run("mmc")]
    got = R.rows(make_results(runs))
    assert [r.runs for r in got] == [(0,), (1,), (2,), (3,), (4,)]
    assert len({r.label for r in got}) == 5
    assert got[2].label == "sce (linf 0.2)"
    assert "trained longer" in got[1].label


def test_rows_show_the_worst_verdict():
    runs = [make_run(seed=0), make_run(seed=1, status="loose"), make_run(seed=2)]
    assert R.rows(make_results(runs))[0].verdict == "loose: gradients vanish on 61% of samples (1 of 3 seeds)"
    void = R.rows(make_results([*runs, make_run(seed=3, status="void")]))[0]
    assert void.robust is None
    assert void.status == "void"
    assert R.rows(make_results([make_run(verdict=None)]))[0].verdict == ""


def _printed(results) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(R.table(results))
    return console.file.getvalue()


def test_the_table_fits_and_tells():
    text = _printed(make_results([*make_results().runs, make_run("[bold]" + "x" * 90, status="void")]))
    assert max(map(len, text.splitlines())) <= 80
    assert "19.5 [14.2, 25.7]" in text
    assert "<= 41.0 [34.1, 48.2]" in text
    assert "[bold]x" in text
    assert "void" in text
    wide = _printed(make_results([make_run("x" * 40, clean=1.0, pgd50=1.0, robust=1.0, status="refuted")]))
    assert "100.0 [98.2, 100.0]" in wide


def test_markdown_csv_and_latex():
    results = make_results([*make_results().runs, make_run("a|b_c&d%<e>\n$\\^~", status="void")])
    marked = R.markdown(results)
    assert "| isce:s=100 | 97.0 | 79.0 | 19.5 [14.2, 25.7] | refuted |" in marked
    assert r"| a\|b\_c\&d%\<e\> \$\\^\~ |" in marked
    read = list(csv_module.DictReader(io.StringIO(R.csv(results))))
    assert float(read[1]["robust"]) == 0.195
    assert float(read[1]["robust_low"]) == results.runs[1].robust.low
    assert read[3]["robust"] == ""
    assert read[3]["loss"] == "a|b_c&d%<e>\n$\\^~"
    tex = R.latex(results)
    assert (
        r"a\textbar{}b\_c\&d\%\textless{}e\textgreater{} \$\textbackslash{}\textasciicircum{}\textasciitilde{} &" in tex
    )
    assert r"$\leq$ 41.0 {[}34.1, 48.2{]} & loose & $+11.0$ & $" in tex
    assert tex.count(r"\\") == 5


@pytest.mark.parametrize("command", ["holdfast compare --out out/digits", ""])
@pytest.mark.parametrize("schema", [1, 2, 3])
def test_load_refuses_an_older_schema_and_says_what_to_rerun(tmp_path, schema, command):
    raw = json.loads(R.to_json(make_results(command=command)))
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**raw, "schema": schema}))
    with pytest.raises(UserError) as refusal:
        R.load(tmp_path)
    again = f"the command recorded in it: {command}" if command else "the evaluation that wrote it."
    assert str(refusal.value) == (
        f"{path} was written by holdfast with results schema {schema}; this version reads schemas 4 to 6: rerun {again}"
    )


def test_certified_has_a_column_before_robust_where_a_run_has_it():
    runs = [proved(0.12), make_run("mmc")]
    head, _, first, second = R.markdown(make_results(runs)).splitlines()
    assert head == "| loss | clean | PGD-50 | certified | robust, 95% | robust verdict |"
    assert first == "| sce | 97.0 | 40.0 | 12.0 | 30.0 [23.7, 36.9] | tight |"
    assert "| 40.0 | - | 30.0 [23.7, 36.9] |" in second
    assert "certified" in _printed(make_results(runs))
    assert r"& 12.0 & 30.0 {[}23.7, 36.9{]}" in R.latex(make_results(runs))
    read = list(csv_module.DictReader(io.StringIO(R.csv(make_results(runs)))))
    assert (float(read[0]["certified"]), read[1]["certified"]) == (0.12, "")
    assert float(read[0]["certified_high"]) == R.proportion(24, 200).high
    for text in (R.markdown, R.latex, R.csv, _printed):
        assert "certified" not in text(make_results())


def test_a_certificate_that_proves_nothing_has_no_column_in_any_table():
    results = make_results([proved(0.0), make_run("mmc")])
    for text in (R.markdown, R.csv):
        assert "certified" not in text(results)
    assert "& certified" not in R.latex(results)
    for text in (_printed, R.notebook):  # not proved: said; without any bound there is nothing to say
        assert "no sample is certified" in re.sub(r"\s+", " ", text(results))
        assert "certified" not in text(make_results())
    shown = make_results([proved(0.0), proved(0.01, make_run("mmc")), proved(None, make_run("center"))])
    assert "certified" in R.markdown(shown)
    assert "no sample is certified" not in R.notebook(shown)
    read = list(csv_module.DictReader(io.StringIO(R.csv(shown))))
    assert [line["certified"] for line in read] == ["0.0", "0.01", ""]  # proved none; one in a hundred; no bound
    assert results.runs[0].certified.value == 0.0  # it stays in the data


def test_both_ends_what_proved_and_what_it_cost_are_one_line():
    run = with_proofs()
    assert run.between == 7
    assert R.bracket_text(make_results([run])) == (
        "Certified 26.5% <= robust accuracy <= 30.0% attacked: 7 of 200 samples lie between. "
        "Proved by linear 27, alpha 26, in 6.0 s."
    )
    late = R.bracket_text(make_results([with_proofs(between=1, late=1)]))
    assert "1 of 200 samples lies between." in late
    assert late.endswith("Time ran out for 1 of those between.")
    exact = R.bracket_text(make_results([with_proofs(between=0)]))
    assert exact.startswith("Certified = attacked = 30.0%: no sample lies between. Proved by linear 30, alpha 30,")
    two = R.bracket_text(make_results([run, with_proofs(make_run("mmc")), make_run("center")]))
    assert (
        two == "Certified 106 samples of 2 runs; 14 of 400 samples lie between. Proved by linear 54, alpha 52, in 12 s."
    )
    for silent in (make_run(), proved(0.0), with_proofs(between=60), with_proofs(make_run(status="void"))):
        assert R.bracket_text(make_results([silent])) == ""


def test_the_csv_counts_what_each_method_proved():
    lines = list(csv_module.DictReader(io.StringIO(R.csv(make_results([with_proofs(), make_run("mmc")])))))
    names = ("between", "proved_linear", "proved_alpha", "proof_seconds")
    assert [[line[name] for name in names] for line in lines] == [["7", "27", "26", "6.0"], ["", "", "", ""]]
    assert "proved_interval" not in lines[0]
    assert "between" not in R.csv(make_results())
    seeds = make_results([with_proofs(make_run(seed=seed)) for seed in (0, 1)])
    [line] = csv_module.DictReader(io.StringIO(R.csv(seeds)))
    assert [line[name] for name in names] == ["14", "54", "52", "12.0"]


def test_certified_and_protocols_are_averaged_over_seeds():
    runs = [proved(c, make_run(seed=s), pgd10=a, cw=0.3) for s, (c, a) in enumerate([(0.1, 0.5), (0.12, 0.6)])]
    (row,) = R.rows(make_results(runs))
    assert row.certified == R.over_seeds([0.1, 0.12])
    assert row.attacks["pgd10"] == R.over_seeds([0.5, 0.6])
    assert row.attacks["cw"] == R.over_seeds([0.3, 0.3])
    (row,) = R.rows(make_results([*runs, proved(None, make_run(seed=2), cw=0.3)]))
    assert row.certified is None  # a mean of some seeds would be of other networks than the rest of the row
    assert list(row.attacks) == ["pgd50", "cw"]


def test_cells_have_a_column_for_each_attack():
    runs = [proved(0.05, **PROTOCOLS), proved(None, make_run("isce:s=4.6", status="loose"), **PROTOCOLS)]
    head, *lines = R.cells(R.rows(make_results(runs)))
    others = [name for name in PROTOCOLS if name != "pgd50"]
    assert head == ("loss", "clean", "PGD-50", *others, "certified", "robust, 95%", "robust verdict")
    figures = (R.percent(PROTOCOLS["pgd50"]), *(R.percent(PROTOCOLS[name]) for name in others))
    assert lines[0] == ("sce", "97.0", *figures, "5.0", "30.0 [23.7, 36.9]", "tight")
    assert lines[1][-3:] == ("-", "<= 30.0 [23.7, 36.9]", "loose")
    assert "| PGD-50 | pgd10 | pgd10-targeted | pgd50-targeted | cw | certified |" in R.markdown(make_results(runs))
    assert "pgd50-targeted & cw & certified" in R.latex(make_results(runs))
    read = list(csv_module.DictReader(io.StringIO(R.csv(make_results(runs)))))
    assert [float(read[0][name]) for name in PROTOCOLS] == list(PROTOCOLS.values())
    assert float(read[0]["cw_low"]) == R.proportion(82, 200).low


def test_cells_show_a_column_only_where_a_row_has_a_value():
    bare = make_run("bare", verdict=None)
    assert R.cells(R.rows(make_results([bare])))[0] == ("loss", "clean", "PGD-50", "robust, 95%")
    trained = {"pgd50-train-loss": 0.35, "cw": 0.41}
    full = dataclasses.replace(proved(0.1, **trained), pgd50_verdict=R.Verdict("refuted", "more"))
    head, first, second = R.cells(R.rows(make_results([full, bare])))
    assert head == (
        "loss",
        "clean",
        "PGD-50",
        "PGD-50 verdict",
        "cw",
        "PGD-50, train loss",
        "certified",
        "robust, 95%",
        "robust verdict",
    )
    assert first == ("sce", "97.0", "40.0", "-10.0 refuted", "41.0", "35.0", "10.0", "30.0 [23.7, 36.9]", "tight")
    assert second[3:] == ("-", "-", "-", "-", "30.0 [23.7, 36.9]", "-")
    for text in (R.markdown, R.latex, R.notebook):
        assert "PGD-50, train loss" in text(make_results([full]))
    assert "pgd50-train-loss_low" in R.csv(make_results([full]))


def test_a_table_of_many_attacks_fits_a_terminal_at_two_threats():
    losses = ("sce", "isce:s=100", "isce:s=4.6@cosine:scale=15")
    pairs = [(loss, eps) for eps in (0.1, 0.2) for loss in losses]
    runs = [proved(0.05, make_run(loss, threat={**THREAT, "eps": eps}), **PROTOCOLS) for loss, eps in pairs]
    runs.append(make_run("mmc", status="void"))
    text = _printed(make_results(runs))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("linf 0.1", "linf 0.2", "isce:s=100 ", "targeted", "30.0 tight", "[23.7, 36.9]", " void "):
        assert part in text, part
    assert "void void" not in text


def test_a_table_with_every_column_folds_its_verdicts():
    runs = [
        dataclasses.replace(
            proved(0.05, make_run("sce", status="loose"), **PROTOCOLS, **{"pgd50-train-loss": 0.35}),
            pgd50_verdict=R.Verdict("refuted", "more"),
        )
    ]
    text = _printed(make_results(runs))
    assert max(map(len, text.splitlines())) <= 80
    heads = [line.split() for line in text.split("─")[0].splitlines()]
    assert heads == [
        ["PGD-50,"],
        ["pgd10-", "pgd50-", "train", "certi-"],
        ["loss", "clean", "PGD-50", "pgd10", "targeted", "targeted", "cw", "loss", "fied", "robust,", "95%"],
    ]
    lines = text.splitlines()
    first, second, third = lines[(at := next(i for i, line in enumerate(lines) if line.startswith("sce"))) : at + 3]
    assert re.fullmatch(r"sce +97\.0 +40\.0 +55\.0 +80\.0 +75\.0 +41\.0 +35\.0 +5\.0 +<= 30\.0 loose *", first)
    assert re.fullmatch(r" +-10\.0 +\[23\.7, 36\.9\] *", second)
    assert third.split() == ["refuted"]


def test_the_gap_stands_before_the_word_and_small_samples_are_said():
    """The same gap is tight on few images and refuted on many: the table shows the gap, the line says why."""
    word = {True: R.Verdict("refuted", "2.5 points too high (...)"), False: R.Verdict("tight", "2.5 points too high")}
    shown = {
        n: dataclasses.replace(make_run(n=n, pgd50=0.325, robust=0.3), pgd50_verdict=word[n > 1000])
        for n in (200, 2000)
    }
    for n, run in shown.items():
        (row,) = R.rows(make_results([run]))
        assert row.pgd50_excess == R.proportion(n // 40, n)
        assert R.cells([row])[1][3] == f"-2.5 {word[n > 1000].status}"
        (line,) = R.doubts(make_results([run]))
        assert line == f"sce: PGD-50, {run.pgd50_verdict.why}: {run.pgd50_verdict.status}"
        for text in (_printed, R.notebook):
            assert "points that other attacks take off it" in re.sub(r"\s+", " ", text(make_results([run])))
    level = dataclasses.replace(make_run(pgd50=0.3, robust=0.3), pgd50_verdict=R.Verdict("tight", "they agree"))
    assert R.cells(R.rows(make_results([level])))[1][3] == "0.0 tight"
    assert R.doubts(make_results([level])) == []


def test_one_loose_seed_of_five_is_said_near_the_table():
    runs = [make_run(seed=seed, status="loose" if seed == 2 else "tight") for seed in range(5)]
    (row,) = R.rows(make_results(runs))
    assert (row.status, row.status_seeds) == ("loose", 1)
    assert row.pgd50_excess == R.over_seeds([0.1] * 5)
    assert R.cells([row])[1][-1] == "1/5 loose"
    for text in (_printed, R.notebook):
        assert "a row has the worst verdict of its seeds, here of 1 of 5" in re.sub(
            r"\s+", " ", text(make_results(runs))
        )
    (line,) = R.doubts(make_results(runs))
    assert line == "sce: robust, gradients vanish on 61% of samples (1 of 5 seeds): loose"
    same = make_results([make_run(seed=seed, status="loose") for seed in range(5)])
    assert R.cells(R.rows(same))[1][-1] == "loose"
    assert "worst verdict" not in _printed(same)


def test_remaining_text_says_what_was_tested_and_what_limits_it():
    left = R.Remaining(1.2, 0, 5, 150, 100, 3, 4, 2)
    assert R.remaining_text(make_run()) == ""
    text = R.remaining_text(make_run(remaining=left))
    assert text == (
        "Two independent attacks on 100 of 150 survivors broke 3 and 4, 2 of them in common: an estimated 1.2 more of "
        "200 are still breakable (95% interval 0 to 5)."
    )
    spot = R.SpotCheck(near=32, near_broken=1, far=32, far_broken=0, rest=320)
    whole = dataclasses.replace(left, spot_checks=(spot,), unfinished=True, votes=3)
    more = R.remaining_text(make_run(remaining=whole)).removeprefix(text)
    for part in ("32 survivors with the smallest margins", "at most 29 more", "budget ran out", "majority of 3 votes"):
        assert part in more
    (line,) = R.doubts(make_results([make_run(remaining=whole)]))
    assert "an estimated 1.2 more of 200 are still breakable, at most 5" in line


def test_the_estimate_of_what_remains_comes_back_from_a_file(tmp_path):
    spot = R.SpotCheck(near=32, near_broken=1, far=32, far_broken=0, rest=320)
    left = R.Remaining(1.2, 0, 5, 150, 100, 3, 4, 2, (spot,))
    assert R.load(R.save(make_results([make_run(remaining=left)]), tmp_path)).runs[0].remaining == left


def test_no_runs_is_an_empty_table():
    empty = make_results(runs=None)
    empty = dataclasses.replace(empty, runs=())
    assert R.rows(empty) == []
    assert R.markdown(empty).count("\n") == 2


# -- names that came from outside


EVIL = "\x1b]0;title\x07\x1b[2J=HYPERLINK(1)\r"


def test_names_are_plain_in_every_table():
    stored = make_results([make_run(EVIL, name=EVIL), make_run("@sum"), make_run("x" * 10**5)])
    stored.data["name"] = EVIL
    texts = [R.csv(stored), R.latex(stored), R.markdown(stored), "\n".join(R.doubts(stored))]
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(R.table(stored))
    for text in (*texts, console.file.getvalue()):
        assert not set(text) & {"\x1b", "\x07", "\r"}
        assert "HYPERLINK" in text or text == texts[3]
        assert len(text) < 20_000


def test_no_cell_of_the_csv_is_a_formula_and_numbers_stay_numbers():
    names = ["=1+2", "+1", "-1", "@sum", "\t=1", "sce"]
    stored = make_results([make_run(name) for name in names])
    lines = list(csv_module.reader(io.StringIO(R.csv(stored))))
    assert [line[0] for line in lines[1:]] == ["'=1+2", "'+1", "'-1", "'@sum", "'\t=1", "sce"]
    for line in lines[1:]:
        assert float(line[2]) == pytest.approx(0.97)
    assert not [cell for line in lines for cell in line if cell.strip().startswith(("=", "+", "@"))]


def test_a_frame_has_the_rows_and_figures_of_the_table():
    results = make_results()
    frame, shown = results.frame(), R.rows(results)
    assert frame.loss.tolist() == [row.label for row in shown]
    assert frame.clean.tolist() == [row.clean.value for row in shown]
    assert frame.robust.isna().tolist() == [row.robust is None for row in shown]
    assert frame.verdict.tolist() == [row.verdict or np.nan for row in shown]
