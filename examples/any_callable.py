"""Evaluate any function from images to logits, here a linear model of scikit-learn, against its known truth.

Under linf a linear model's worst case is known in closed form, so the bench can be held against it: nothing that is
robust in truth may break, and whatever stands beyond that is what the attacks missed.
"""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from holdfast import data
from holdfast.checks import audit
from holdfast.evaluation import evaluate
from holdfast.threat import Threat

split = data.load("digits", fold=(0, 5))
train, test = data.pixels(split.train.x).flatten(1), data.pixels(split.test.x).flatten(1)
fitted = LogisticRegression(max_iter=1000).fit(train.numpy(), split.train.y.numpy())
weight = torch.tensor(fitted.coef_, dtype=torch.float32)
bias = torch.tensor(fitted.intercept_, dtype=torch.float32)


def model(x: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] -> (N, K) logits. Any callable will do; a network of torch is one."""
    return x.flatten(1) @ weight.T + bias


threat = Threat("linf", 0.05)
found = evaluate(model, split.test, threat, "quick")
judged = audit(model, split.test, found)
robust = judged.evaluation.robust

# The truth: in the box around x, cut to [0, 1], each gap z_j - z_y is largest in a corner.
y = split.test.y
rows = weight[None] - weight[y][:, None]  # (N, K, D): how each gap changes with each pixel
up, down = (1 - test).clamp_max(threat.eps), test.clamp_max(threat.eps)
rise = (rows.clamp_min(0) * up[:, None] - rows.clamp_max(0) * down[:, None]).sum(2)
logits = model(split.test.x / 255)
gaps = (logits - logits.gather(1, y[:, None]) + rise).scatter(1, y[:, None], -torch.inf)
truth = gaps.amax(1) < 0

print(f"clean {found.clean.float().mean():.1%}, published {found.pgd50.float().mean():.1%}")
print(f"robust: at most {robust.float().mean():.1%} by attacks, {truth.float().mean():.1%} in truth")
print(f"broken though robust: {int((truth & ~robust).sum())}, missed: {int((robust & ~truth).sum())}")
