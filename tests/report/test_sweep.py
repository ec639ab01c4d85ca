"""A swept setting is found among rows, and drawn with its intervals."""

from __future__ import annotations

import dataclasses

from tests.results.factory import make_results, make_run

from holdfast import report
from holdfast import results as R
from holdfast.report.sweep import draw_sweeps, sweeps


def results_of(*names, seeds=1):
    runs = [make_run(loss=name, name=f"{name}-{seed}", seed=seed) for name in names for seed in range(seeds)]
    return dataclasses.replace(make_results(), runs=tuple(runs))


def test_rows_that_differ_in_one_number_are_a_sweep_in_order_of_its_value():
    results = results_of("isce:s=10", "sce", "isce:s=1", "isce:s=1/2", "isce:s=1e2", "isce_b:tau=1", "isce_b:tau=2")
    [found] = sweeps(results)
    assert (found.name, found.setting) == ("isce:s=...", "s")
    assert [value for value, _ in found.points] == [0.5, 1, 10, 100]
    assert [row.loss for _, row in found.points] == ["isce:s=1/2", "isce:s=1", "isce:s=10", "isce:s=1e2"]


def test_a_grid_is_swept_along_each_of_its_settings():
    names = [f"cosface:m={m},scale={scale}" for m in (0.1, 0.2, 0.3) for scale in (8, 16, 32)]
    found = sweeps(results_of(*names))
    assert {sweep.name for sweep in found} == {
        "cosface:m=...,scale=8", "cosface:m=...,scale=16", "cosface:m=...,scale=32",
        "cosface:m=0.1,scale=...", "cosface:m=0.2,scale=...", "cosface:m=0.3,scale=...",
    }  # fmt: skip
    assert all(len(sweep.points) == 3 for sweep in found)


def test_a_setting_of_the_objective_or_the_schedule_counts_too():
    found = sweeps(results_of(*[f"sce+adversarial:steps={n},ramp=0.3+fit:lr=1e-3" for n in (1, 2, 5)]))
    assert [(sweep.name, sweep.setting) for sweep in found] == [
        ("sce+adversarial:steps=...,ramp=0.3+fit:lr=1e-3", "steps")
    ]


def test_two_values_are_no_sweep(tmp_path):
    results = results_of("isce:s=1", "isce:s=3", "sce*100")
    assert sweeps(results) == []
    assert draw_sweeps(results) is None
    assert "Accuracy over a setting" not in report.render(results, tmp_path / "report.html").read_text()


def test_the_figure_has_the_rows_values_and_their_intervals(tmp_path):
    results = results_of("isce:s=1", "isce:s=3", "isce:s=10", seeds=3)
    ax = draw_sweeps(results).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "3", "10"]
    drawn = {bars.lines[0].get_color(): list(bars.lines[0].get_ydata()) for bars in ax.containers}
    for row in R.rows(results):
        assert any(100 * row.robust.value in values for values in drawn.values())
    [ends] = [bars.lines[2][0].get_segments()[0] for bars in ax.containers[:1]]
    clean = R.rows(results)[0].clean
    assert sorted(ends[:, 1].tolist()) == [100 * clean.low, 100 * clean.high]
    page = report.render(results, tmp_path / "report.html").read_text()
    assert "Accuracy over a setting" in page
    assert (tmp_path / "figures").exists() or report.figures(results, tmp_path / "figures")
    assert (tmp_path / "figures" / "sweep.svg").exists()
