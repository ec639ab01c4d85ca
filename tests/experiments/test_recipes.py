"""Recipes: each can be run, small ones are; numbers outside what is expected are said, and end with status 1."""

from __future__ import annotations

import dataclasses

import pytest
from tests.results.test_results import make_results, make_run

from holdfast.data import load
from holdfast.errors import UserError
from holdfast.experiments import recipes
from holdfast.experiments.recipes import RECIPES, Recipe, compare_to_expected, named, resized
from holdfast.results import Interval


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_can_be_run(name):
    recipe = named(name)
    comparison = recipe.comparison.checked()
    assert recipe.about
    assert recipe.cost
    for (row, column), (low, high) in recipe.expects.items():
        assert row in comparison.losses
        assert column in ("clean", "pgd50", "robust", "certified")
        assert 0 <= low < high <= 1


@pytest.mark.parametrize("name", [name for name in RECIPES if "digits" not in name])
def test_a_recipe_takes_the_data_it_is_given(name):
    assert named(name, "somewhere/cifar").comparison.data == "somewhere/cifar"


def test_every_loss_that_papers_train_with_is_in_the_table_of_losses():
    from holdfast.losses import LOSSES
    from holdfast.spec import parse

    scores = {"dlr", "negative_margin"}  # what attacks climb; trained with in records alone
    rows = named("losses").comparison.losses
    assert {parse(row.partition("+")[0])[0] for row in rows} == set(LOSSES) - scores
    plain = [row for row in rows if "+" not in row]
    assert [row.partition("+")[0] for row in rows if "+" in row] == plain


def test_another_size_changes_what_it_names_and_nothing_else():
    before = named("losses").comparison
    after = resized(before, seeds=2, epochs=3, model=None)
    assert (after.seeds, after.fit.epochs) == (2, 3)
    assert dataclasses.replace(after, seeds=before.seeds, fit=before.fit) == before


def test_unknown_names_and_data_that_is_not_asked_for_are_refused():
    with pytest.raises(UserError, match="Did you mean 'mnist'"):
        named("mnst")
    with pytest.raises(UserError, match="takes no data"):
        named("digits", "mnist")


def test_what_is_measured_is_held_against_what_is_expected():
    recipe = Recipe("", recipes.digits().comparison, "", {
        ("sce", "clean"): (0.9, 1.0), ("sce", "robust"): (0.9, 1.0), ("sce", "certified"): (0.0, 1.0),
        ("mmc", "clean"): (0.0, 1.0),
    })  # fmt: skip
    run = dataclasses.replace(make_run("sce"), clean=Interval(0.95, 0.9, 1), robust=Interval(0.4, 0.3, 0.5))
    later = dataclasses.replace(run, threat={**run.threat, "eps": 0.2}, robust=Interval(0.95, 0.9, 1))
    found = compare_to_expected(recipe, make_results([run, later]))
    assert [(one.value, one.holds) for one in found] == [(0.95, True), (0.4, False), (None, False), (None, False)]


def test_the_data_of_photographs_has_their_schedule():
    fit = named("losses", "path/cifar10").comparison.fit
    assert (fit.optimizer, fit.flip, fit.pad) == ("sgd", True, 4)
    assert load("digits").shape == (1, 8, 8)
