"""What several test files share: a training loop for small networks, and digits as a parquet folder."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from holdfast import data


def on_digits(layers, *, lr, epochs):
    """(net, split): the layers that ``layers`` makes, trained on scikit-learn's digits, always the same."""
    split = data.load("digits", val=0.0)
    x, y = data.pixels(split.train.x), split.train.y
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*layers())
        optimizer = torch.optim.Adam(net.parameters(), lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval().requires_grad_(False), split


def right_ones(net, split, most):
    """(x, y) of at most so many test digits that the network gets right."""
    x, y = data.pixels(split.test.x), split.test.y
    right = torch.nonzero(net(x).argmax(1) == y)[:, 0]
    assert len(right) > 0.9 * len(y)
    return x[right[:most]], y[right[:most]]


def write_parquet(folder, train=120, test=40, *, top=None, photographs=False):
    """scikit-learn's first digits as a parquet folder with a test split; returns its path as text.

    top: labels are taken modulo top + 1; photographs: 32x32, in colour.
    """
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int32())])
    for name, rows in (("train", range(train)), ("test", range(train, train + test))):
        cells = []
        for row in rows:
            buffer = io.BytesIO()
            picture = Image.fromarray((digits.images[row] * 15).astype(np.uint8))
            (picture.resize((32, 32)).convert("RGB") if photographs else picture).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        labels = [int(digits.target[row]) if top is None else int(digits.target[row]) % (top + 1) for row in rows]
        pq.write_table(pa.table({"image": cells, "label": labels}, schema=kinds), folder / f"{name}.parquet")
    return str(folder)
