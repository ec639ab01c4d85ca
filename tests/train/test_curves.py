"""holdfast curves: what the log says is what is drawn; robust overfitting has a number."""

from __future__ import annotations

import json

import pytest

from holdfast.errors import UserError
from holdfast.train import curves


def run_folder(folder, *lines, **config):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"loss": "sce", "fit": {"seed": 3}, **config}))
    return folder


LINES = [
    {"epoch": 1, "loss": 2.0, "val": 0.5, "val_robust": 0.3},
    {"epoch": 2, "loss": 1.0, "val": 0.8, "val_robust": 0.6},
    {"epoch": 3, "loss": 0.5, "val": 0.9, "val_robust": 0.45},
]


def test_what_the_best_epoch_had_and_the_last_lost(tmp_path):
    curve = curves.read(run_folder(tmp_path / "run", *LINES, objective="fast"))
    assert (curve.loss, curve.val, curve.robust) == ([2.0, 1.0, 0.5], [0.5, 0.8, 0.9], [0.3, 0.6, 0.45])
    assert curve.best == 2
    assert curve.overfitting == pytest.approx(0.15)
    assert curves.sentence(curve) == (
        "sce, seed 3, fast: 3 epochs, loss 0.5, validation 90.0%, robust validation 45.0%; epoch 2 had 60.0%."
    )


def test_where_no_threat_is_watched_there_is_no_robust_figure(tmp_path):
    curve = curves.read(run_folder(tmp_path / "run", {"loss": 2.0, "val": 0.5}, {"loss": 1.0, "val": None}))
    assert (curve.best, curve.overfitting) == (1, None)
    assert curves.sentence(curve) == "sce, seed 3: 2 epochs, loss 1."


def test_the_output_of_a_comparison_is_all_of_its_runs(tmp_path):
    for name in ("b", "a"):
        run_folder(tmp_path / "runs" / name, *LINES)
    assert [folder.name for folder in curves.folders(tmp_path)] == ["a", "b"]
    assert curves.folders(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "has no log.jsonl"),
        ("", "no epoch has ended"),
        ("{", "cannot be read"),
        ('{"a":1}', "line 1.loss is missing"),
    ],
)
def test_what_cannot_be_drawn_says_why(text, why, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=why):
        curves.read(tmp_path)
    with pytest.raises(UserError, match=r"holds no log\.jsonl"):
        curves.folders(tmp_path / "nowhere")


def test_the_figure_draws_every_number_of_the_log(tmp_path):
    curve = curves.read(run_folder(tmp_path / "run", *LINES))
    top, bottom = curves.figure([curve]).axes
    assert list(top.lines[0].get_ydata()) == [2.0, 1.0, 0.5]
    plain, robust, best = bottom.lines
    assert list(plain.get_ydata()) == pytest.approx([50, 80, 90])
    assert list(robust.get_ydata()) == pytest.approx([30, 60, 45])
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], pytest.approx([60]))
    files = curves.save([curve], tmp_path)
    assert [path.name for path in files] == ["curves.svg", "curves.png", "curves.pdf"]
    assert "mathdefault" not in files[0].read_text()
