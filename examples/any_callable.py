"""Evaluate any function from images to logits: here a scikit-learn model with known exact robustness.

Under linf the worst case of a linear model is known in closed form. So the evaluation can be checked: no sample that is
robust may be broken, and every survivor that is not robust was missed by the attacks.
"""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from holdfast import Threat, data, evaluate_network

split = data.load("digits", fold=(0, 5))
train, test = data.pixels(split.train.x).flatten(1), data.pixels(split.test.x).flatten(1)
fitted = LogisticRegression(max_iter=1000).fit(train.numpy(), split.train.y.numpy())
weight = torch.tensor(fitted.coef_, dtype=torch.float32)
bias = torch.tensor(fitted.intercept_, dtype=torch.float32)


def model(x: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] -> (N, K) logits. Any callable works; a torch network is one."""
    return x.flatten(1) @ weight.T + bias


threat = Threat("linf", 0.05)
result = evaluate_network(model, split.test, threat, "quick")
robust = result.evaluation.robust

# The exact answer: in the box around x, clipped to [0, 1], each logit difference z_j - z_y is largest in a corner.
y = split.test.y
rows = weight[None] - weight[y][:, None]  # (N, K, D): derivative of each logit difference with respect to each pixel
up, down = (1 - test).clamp_max(threat.eps), test.clamp_max(threat.eps)
increase = (rows.clamp_min(0) * up[:, None] - rows.clamp_max(0) * down[:, None]).sum(2)
logits = model(split.test.x / 255)
worst = (logits - logits.gather(1, y[:, None]) + increase).scatter(1, y[:, None], -torch.inf)
exact = worst.amax(1) < 0

print(result)
print(f"robust: at most {robust.float().mean():.1%} by attacks, exactly {exact.float().mean():.1%}")
print(f"broken although robust: {int((exact & ~robust).sum())}, missed: {int((robust & ~exact).sum())}")
