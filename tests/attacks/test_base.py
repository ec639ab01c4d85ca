"""What every attack shares: what counts as fooled, and the most adversarial point seen for each sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.attacks import MostAdversarial, fooled


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fooled_wants_finite_logits(bad):
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 5.0], [bad, 0.0, 0.0], [3.0, 1.0, bad]])
    assert fooled(z, torch.zeros(4, dtype=torch.int64)).tolist() == [True, False, False, False]


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_the_worst_point_is_a_maximum_over_all_that_was_seen(points, pick):
    """Against a literal search, whatever the order and whichever rows see a point; NaN and infinity included."""
    y = torch.tensor([0, 1, 0])
    x = torch.zeros(3, 1)
    worst, seen = MostAdversarial(x, y), [[] for _ in range(3)]
    for number, values in enumerate(points):
        z = torch.tensor([[v, -v] for v in values])
        broken = pick.draw(st.lists(st.sampled_from([0.0, math.nan, math.inf]), min_size=3, max_size=3))
        z[:, 0] += torch.tensor(broken)
        rows = torch.tensor(sorted(pick.draw(st.sets(st.integers(0, 2), min_size=1))))
        stands = worst.update(rows, torch.full((len(rows), 1), number + 1.0), z[rows])
        for k, row in enumerate(rows.tolist()):
            seen[row].append((bool(fooled(z[row : row + 1], y[row : row + 1])), float(number + 1)))
            assert bool(stands[k]) == (not any(f for f, _ in seen[row]))
    for row in range(3):
        hits = [number for f, number in seen[row] if f]
        assert not hits or float(worst.x[row]) in hits
        assert bool(worst.fooled[row]) == bool(hits)
