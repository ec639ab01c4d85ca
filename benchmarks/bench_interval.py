"""A step of interval-bound training against the classic formula, written by hand for each layer: CPU time and numbers.

    python benchmarks/bench_interval.py [NAME ...]

Batch 128, float32, forward + backward, CPU seconds of one process (``time.process_time``). Both sides run in turn, and
the ratio is taken pair by pair. Goals: <= 1.15x of the formula, bounds and gradients within 6e-6 of their largest.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goals import goal
from holdfast import Threat, models
from holdfast.bounds import box_of, logit_difference_bounds
from holdfast.models.convnets import Step

SHAPES = {"mlp": (1, 28, 28), "smallconv": (1, 8, 8), "convnet": (1, 28, 28), "stepnet": (1, 28, 28)}
PAIRS, BATCH, EPS = 60, 128, 0.1


def by_hand(model: models.Classifier, lo: Tensor, hi: Tensor, y: Tensor) -> Tensor:
    """center' = W center + b, radius' = |W| radius; other layers at both corners; the last one as W_j - W_y."""
    center, radius = (lo + hi) / 2, (hi - lo) / 2
    center, radius = (center - model.mean) / model.std, radius / model.std
    for layer in model.backbone.layers:
        if isinstance(layer, nn.Linear):
            center, radius = layer(center), F.linear(radius, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            center = layer(center)
            radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
        elif isinstance(layer, nn.Flatten):
            center, radius = layer(center), layer(radius)
        elif isinstance(layer, nn.ReLU | Step):
            low, high = layer(center - radius), layer(center + radius)
            center, radius = (low + high) / 2, (high - low) / 2
        else:
            raise TypeError(type(layer).__name__)
    last = model.head.linear
    logits = last(center)
    difference = (last.weight[None] - last.weight[:, None]).abs()[y]
    bounds = logits - logits.gather(1, y[:, None]) + torch.einsum("nd,nkd->nk", radius, difference)
    return bounds.scatter(1, y[:, None], 0.0)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def measure(name: str) -> None:
    """Print the ratio of CPU seconds, and how far bounds and gradients are apart."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    model = models.build(name, shape, 10, seed=0)
    x, y = torch.rand(BATCH, *shape), torch.randint(10, (BATCH,))
    lo, hi = box_of(x, Threat("linf", EPS))
    weights = torch.rand(BATCH, 10)
    sides = logit_difference_bounds, by_hand
    bounds, grads = [], []
    for side in sides:
        out = side(model, lo, hi, y)
        bounds.append(out.detach())
        grads.append(torch.autograd.grad((weights * out).sum(), list(model.parameters())))
    ratios, spent = [], {side: [] for side in sides}
    for pair in range(PAIRS + 5):
        taken = {}
        for side in sides if pair % 2 else sides[::-1]:
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            (weights * side(model, lo, hi, y)).sum().backward()
            taken[side] = time.process_time() - began
        if pair >= 5:
            ratios.append(taken[sides[0]] / taken[sides[1]])
            for side in sides:
                spent[side].append(taken[side])
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (1e3 * statistics.median(spent[side]) for side in sides)
    off = max(apart(a, b) for a, b in zip(*grads, strict=True))
    print(
        f"{name:<10} {ours:7.2f} ms {theirs:7.2f} ms by hand   {middle:.2f} [{low:.2f}, {high:.2f}]"
        f"   bounds {apart(*bounds):.0e}   gradients {off:.0e}",
        flush=True,
    )
    peer = f"{theirs:.2f} ms, the formula by hand"
    goal(f"a step of interval training, {name}", middle, 1.15, ours=f"{ours:.2f} ms", peer=peer, unit="x")
    goal(f"difference of bounds and gradients, {name}", max(apart(*bounds), off), 6e-6, peer="the formula by hand")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, batch {BATCH}: median ratio [quartiles] of {PAIRS} pairs")
    for chosen in sys.argv[1:] or SHAPES:
        measure(chosen)
