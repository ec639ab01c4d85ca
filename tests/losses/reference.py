"""Literal twins of every loss and score: the textbook formula, sample by sample, in plain Python.

No code, no stabilising trick and no tensor is shared with src: exponentials and logarithms are taken in 60-digit
decimals, where ``-log(e^{z_y} / sum_j e^{z_j})`` can be written as it stands. Every twin has one signature,
``twin(z, y, h, d, **settings) -> list of N floats``: lists of logits, labels, features, squared distances.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

DIGITS = Context(prec=60, Emax=999999, Emin=-999999)


def exp(value):
    with localcontext(DIGITS):
        return (value if isinstance(value, Decimal) else Decimal(value)).exp()


def log(value):
    with localcontext(DIGITS):
        return (value if isinstance(value, Decimal) else Decimal(value)).ln()


def cross_entropy(z, y):
    """-log( e^{z_y} / sum_j e^{z_j} ) for one row; the entries may be floats or decimals."""
    with localcontext(DIGITS):
        total = Decimal(0)
        for value in z:
            total += exp(value)
        return -log(exp(z[y]) / total)


def softmax(z):
    with localcontext(DIGITS):
        total = sum((exp(value) for value in z), Decimal(0))
        return [exp(value) / total for value in z]


def sce(z, y, h=None, d=None, *, smoothing=0.0, temperature=1.0):
    """T times: target 1 - e on y, plus e / K on every class, -sum_k q_k log p_k, with p the softmax of z / T."""
    losses = []
    for row, label in zip(z, y, strict=True):
        with localcontext(DIGITS):
            row = [Decimal(value) / Decimal(temperature) for value in row]
            loss = Decimal(0)
            for k in range(len(row)):
                q = Decimal(smoothing) / len(row) + (1 - Decimal(smoothing) if k == label else 0)
                loss += q * cross_entropy(row, k)
            losses.append(float(Decimal(temperature) * loss))
    return losses


def bonus(s, i, j, n):
    """s of sample i for competitor j, from a number, K numbers, or N rows of 1 or K numbers."""
    if not isinstance(s, list):
        return s
    if not isinstance(s[0], list):
        return s[j]
    row = s[i] if len(s) == n else s[0]
    return row[j] if len(row) > 1 else row[0]


def lifted(row, label, s, i, n):
    """The logits z_j + s_j, with s_y = 0, in decimals: no rounding."""
    with localcontext(DIGITS):
        return [Decimal(row[j]) + (Decimal(bonus(s, i, j, n)) if j != label else Decimal(0)) for j in range(len(row))]


def isce(z, y, h=None, d=None, *, s=1.0, gamma=0.0, temperature=1.0):
    """T (1 - p)^gamma (-log p), p = e^{z_y / T} / (e^{z_y / T} + sum_{j != y} e^{(z_j + s_j) / T})."""
    losses = []
    for i, (row, label) in enumerate(zip(z, y, strict=True)):
        with localcontext(DIGITS):
            row = [value / Decimal(temperature) for value in lifted(row, label, s, i, len(z))]
            focal = (1 - softmax(row)[label]) ** Decimal(gamma) if gamma else 1
            losses.append(float(Decimal(temperature) * focal * cross_entropy(row, label)))
    return losses


def isce_gradient(z, y, *, s=1.0):
    """d isce / d z_k = p~_k - 1[k = y], with p~ the softmax of z + s."""
    rows = []
    for i, (row, label) in enumerate(zip(z, y, strict=True)):
        p = softmax(lifted(row, label, s, i, len(z)))
        with localcontext(DIGITS):
            rows.append([float(p[k] - (1 if k == label else 0)) for k in range(len(row))])
    return rows


def isce_b(z, y, h=None, d=None, *, tau=0.0):
    """-log( e^{z_y} / (sum_j e^{z_j} + e^tau) )."""
    losses = []
    for row, label in zip(z, y, strict=True):
        with localcontext(DIGITS):
            total = sum((exp(value) for value in row), Decimal(0))
            if tau != -math.inf:
                total += exp(tau)
            losses.append(float(-log(exp(row[label]) / total)))
    return losses


def isce_c(z, y, h=None, d=None, *, m=0.1, s=1.0, clip=True, mask="predicted"):
    """t = z / ||z||; the entry of the winner, or of y, is min(1, max(-1, s (t + m))); cross-entropy of that."""
    losses = []
    for row, label in zip(z, y, strict=True):
        with localcontext(DIGITS):
            length = sum((Decimal(value) ** 2 for value in row), Decimal(0)).sqrt()
            t = [Decimal(value) / length for value in row]
            winner = max(range(len(row)), key=lambda j: row[j]) if mask == "predicted" else label
            t[winner] = Decimal(s) * (t[winner] + Decimal(m))
            if clip:
                t[winner] = min(Decimal(1), max(Decimal(-1), t[winner]))
            losses.append(float(cross_entropy(t, label)))
    return losses


def squared(a, b):
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def contrastive(z, y, h, d=None, *, weight=0.05, separation=1.0):
    losses = sce(z, y)
    for i in range(len(y)):
        pairs = []
        for j in range(len(y)):
            if j == i:
                continue
            if y[i] == y[j]:
                pairs.append(squared(h[i], h[j]) / 2)
            else:
                pairs.append(max(0.0, separation - math.sqrt(squared(h[i], h[j]))) ** 2 / 2)
        if pairs:
            losses[i] += weight * math.fsum(pairs) / len(pairs)
    return losses


def unit(row):
    size = math.sqrt(math.fsum(value * value for value in row))
    return [value / size for value in row]


def triplet(z, y, h, d=None, *, weight=1.0, separation=0.2):
    losses = sce(z, y)
    h = [unit(row) for row in h]
    for a in range(len(y)):
        negatives = [squared(h[a], h[n]) for n in range(len(y)) if y[n] != y[a]]
        terms = []
        for p in range(len(y)):
            if p == a or y[p] != y[a] or not negatives:
                continue
            positive = squared(h[a], h[p])
            farther = [value for value in negatives if value > positive]
            negative = min(farther) if farther else max(negatives)
            terms.append(max(0.0, positive - negative + separation))
        if terms:
            losses[a] += weight * math.fsum(terms) / len(terms)
    return losses


def center(z, y, h, d, *, weight=0.05):
    return [loss + weight / 2 * row[label] for loss, row, label in zip(sce(z, y), d, y, strict=True)]


def lgm(z, y, h, d, *, ratio=0.1, weight=0.01):
    """d holds squared Mahalanobis distances, z = -d/2 - log|L|/2: log|L_k|/2 is read back from the two.

    -log softmax_k( -(d_k/2)(1 + ratio 1[k = y]) - log|L_k|/2 )_y + weight (d_y/2 + log|L_y|/2)
    """
    losses = []
    for logits, distances, label in zip(z, d, y, strict=True):
        with localcontext(DIGITS):
            half = [Decimal(value) / 2 for value in distances]
            halflog = [-Decimal(logit) - part for logit, part in zip(logits, half, strict=True)]
            row = []
            for k in range(len(half)):
                grown = half[k] * (1 + Decimal(ratio)) if k == label else half[k]
                row.append(-grown - halflog[k])
            loss = cross_entropy(row, label) + Decimal(weight) * (half[label] + halflog[label])
        losses.append(float(loss))
    return losses


def mmc(z, y, h, d):
    return [row[label] / 2 for row, label in zip(d, y, strict=True)]


def cosface(z, y, h=None, d=None, *, m=0.35, scale=64.0):
    losses = []
    for row, label in zip(z, y, strict=True):
        with localcontext(DIGITS):
            cos = [Decimal(value) / Decimal(scale) for value in row]
            cos[label] -= Decimal(m)
            losses.append(float(cross_entropy([Decimal(scale) * value for value in cos], label)))
    return losses


def arcface(z, y, h=None, d=None, *, m=0.5, scale=64.0):
    losses = []
    for row, label in zip(z, y, strict=True):
        angle = math.acos(row[label] / scale)
        turned = math.cos(angle + m) if angle <= math.pi - m else math.cos(angle) - m * math.sin(m)
        lowered = list(row)
        lowered[label] = scale * turned
        losses.append(float(cross_entropy(lowered, label)))
    return losses


def negative_margin(z, y, h=None, d=None):
    return [max(row[j] for j in range(len(row)) if j != k) - row[k] for row, k in zip(z, y, strict=True)]


def dlr(z, y, h=None, d=None):
    losses = []
    for row, rise in zip(z, negative_margin(z, y), strict=True):
        ranked = sorted(row, reverse=True)
        losses.append(rise if len(row) < 3 else rise / (ranked[0] - ranked[2]))
    return losses


def targeted_dlr(z, y, t):
    losses = []
    for row, label, goal in zip(z, y, t, strict=True):
        ranked = sorted(row, reverse=True)
        rise = row[goal] - row[label]
        losses.append(rise if len(row) < 4 else rise / (ranked[0] - (ranked[2] + ranked[3]) / 2))
    return losses


def gap(z, y, h=None, d=None):
    """log sum_{j != y} e^{z_j} - z_y."""
    values = []
    for row, label in zip(z, y, strict=True):
        with localcontext(DIGITS):
            total = sum((exp(row[j]) for j in range(len(row)) if j != label), Decimal(0))
            values.append(float(log(total) - Decimal(row[label])))
    return values


LOSSES = {
    "sce": sce,
    "isce": isce,
    "isce_b": isce_b,
    "isce_c": isce_c,
    "contrastive": contrastive,
    "triplet": triplet,
    "center": center,
    "lgm": lgm,
    "mmc": mmc,
    "cosface": cosface,
    "arcface": arcface,
    "dlr": dlr,
    "negative_margin": negative_margin,
}


def mix(z):
    """SplitMix64's finaliser on Python integers."""
    mask = 2**64 - 1
    z &= mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def bits(seed, index, count):
    """The numbers of one sample, unsigned: a hash of (seed, index), then of that and the position."""
    golden = 0x9E3779B97F4A7C15
    row = mix(index * golden + mix(seed + golden))
    return [mix(row + position * golden) for position in range(1, count + 1)]
