"""Small SVG curves of every loss and its derivative against u, computed by the losses themselves.

One image moves from its own class to a rival. Its features h = mu_y + t (mu_rival - mu_y) lie between two corners of a
regular simplex of 10 classes and radius 3. u = logsumexp_{j != y} z_j - z_y measures how close it is to a mistake.
Logits, distances and cosines are those of the loss's own head at h.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from holdfast.losses import LOSSES, LossEntry, isce, negative_log_odds
from holdfast.models.heads import max_mahalanobis_centers, squared_distances
from holdfast.outputs import Outputs

CLASSES, RADIUS, SCALE = 10, 3.0, 15.0
LOOK = {
    "svg.hashsalt": "holdfast", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
    "axes.prop_cycle": mpl.cycler(color=["#00796b", "#d84315", "#5e35b1", "#f9a825"]),
    "lines.linewidth": 1.6, "legend.frameon": False,
}  # fmt: skip
# The settings that a loss is drawn with; a loss that is not listed is drawn with its defaults.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "sce": ({}, {"smoothing": 0.1}),
    "isce": ({"s": 0.0}, {"s": 3.0}, {"s": 10.0}),
    "isce_b": ({"tau": -10.0}, {"tau": 3.0}, {"tau": 10.0}),
    "isce_c": ({}, {"m": 0.0}, {"clip": False}),
    "center": ({}, {"weight": 0.5}),
    "contrastive": ({}, {"weight": 1.0}),
    "lgm": ({}, {"ratio": 0.3}),
    "cosface": ({"m": 0.0, "scale": SCALE}, {"m": 0.2, "scale": SCALE}),
    "arcface": ({"m": 0.0, "scale": SCALE}, {"m": 0.5, "scale": SCALE}),
}


def outputs_at(entry: LossEntry, t: Tensor) -> Outputs:
    """Outputs of the loss's own head for images at t. Each image is followed by two other samples, one at the center of
    its own class and one at the rival's, for the losses that compare the samples of a batch."""
    mu = max_mahalanobis_centers(CLASSES, CLASSES, RADIUS).double()
    others = torch.tensor([0.0, 1.0], dtype=t.dtype).expand(len(t), 2)
    positions = torch.cat([t[:, None], others], 1)[..., None]  # (T, 3, 1)
    h = (mu[0] + positions * (mu[1] - mu[0])).flatten(0, 1)
    distances = squared_distances(h, mu)
    if entry.head == "cosine":
        logits = SCALE * F.normalize(h, dim=1) @ F.normalize(mu, dim=1).T
    elif entry.head in ("mmc", "gaussian"):
        logits = -distances / 2
    else:
        logits = h @ mu.T
    return Outputs(logits, h, distances)


def values(entry: LossEntry, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(u, loss, d loss / d u) along the path from one class to the other: (T,) each."""
    t = torch.linspace(-0.15, 1.1, 140, dtype=torch.float64).requires_grad_()
    out, y = outputs_at(entry, t), torch.tensor([0, 0, 1]).repeat(len(t))
    u = negative_log_odds(out, y)[::3]
    if entry.coupled:  # a batch of three at a time
        batches = [Outputs(*(part[i : i + 3] for part in out)) for i in range(0, len(y), 3)]
        loss = torch.stack([entry.loss(batch, y[:3], **settings)[0] for batch in batches])
    else:
        loss = entry.loss(out, y, **settings)[::3]
    d_loss, d_u = (torch.autograd.grad(value.sum(), t, retain_graph=True)[0] for value in (loss, u))
    return u.detach(), loss.detach(), d_loss / d_u


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes at every build."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def draw_loss(name: str) -> bytes:
    """A loss and its slope against u."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7.4, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        for settings in SETTINGS.get(name, ({},)):
            u, loss, derivative = values(LOSSES[name], settings)
            label = ", ".join(f"{key} = {value:g}" for key, value in settings.items()) or "default"
            left.plot(u, loss, label=label)
            right.plot(u, derivative, label=label)
        for ax, title in ((left, name), (right, f"derivative of {name}: d loss / d u")):
            ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            ax.set(title=title, xlabel="u   (right  <  0  <  wrong)")
        left.legend()
        return svg(figure)


def draw_dead_zone() -> bytes:
    """The gradient at the true logit in float32 against the margin, with one competitor."""
    margin = torch.linspace(0, 120, 241)
    z = torch.stack([margin, torch.zeros_like(margin)], 1).requires_grad_()
    y = torch.zeros(len(margin), dtype=torch.int64)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7.4, 2.7), layout="constrained")
        ax = figure.subplots()
        for label, loss, line in (
            ("F.cross_entropy", partial(F.cross_entropy, reduction="none"), {"linewidth": 5, "alpha": 0.5}),
            ("softplus(u), holdfast's SCE", partial(isce, s=0.0), {"linestyle": "--"}),
            ("softplus(u + 100), I-SCE", partial(isce, s=100.0), {}),
            ("u, the score of attacks", negative_log_odds, {}),
        ):
            (grad,) = torch.autograd.grad(loss(z, y).sum(), z)
            size = grad[:, 0].abs()
            ax.semilogy(margin[size > 0], size[size > 0], label=label, **line)
        ax.set(
            xlabel="margin: z_y - largest other logit", ylabel="gradient at z_y", ylim=(1e-48, 1e4),
            title="float32: where a line ends, the gradient is exactly 0",
        )  # fmt: skip
        ax.legend(loc="lower left")
        return svg(figure)
