"""Data as users have it: a pair, a DataLoader, a torch or a Hugging Face data set, a name."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from holdfast import mapped
from holdfast.data import load
from holdfast.data.arguments import as_data
from holdfast.errors import UserError

DIGITS = load("digits", fold=(0, 5))
X, Y = DIGITS.test.x[:30], DIGITS.test.y[:30]
TENSORS = TensorDataset(X, Y)
NAMES = [f"digit {k}" for k in range(10)]


class Pictures(Dataset):
    """As torchvision's data sets without a transform: Pillow images, labels as int, names of the classes."""

    classes = NAMES

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return Image.fromarray(X[i, 0].numpy()), int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def of_the_hub():
    images = [Image.fromarray(x[0].numpy()) for x in X]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": Y.tolist()}, features=features)


class Short(Stream):
    """Says that it has more samples than it gives."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


class Floats(Stream):
    def __init__(self, low=0.0, high=1.0):
        self.low, self.high = low, high

    def __iter__(self):
        return ((self.low + (self.high - self.low) * x / 255.0, y) for x, y in zip(X, Y, strict=True))


def by_name(batch):
    x, y = torch.utils.data.default_collate(batch)
    return {"pixel_values": x, "labels": y}


@pytest.mark.parametrize(
    "given",
    [
        (X, Y), [X.numpy(), Y.numpy()], TENSORS, Subset(TENSORS, range(30)), Pictures(), Stream(), of_the_hub(),
        DataLoader(TENSORS, batch_size=7), DataLoader(TENSORS, batch_size=7, collate_fn=by_name),
        DataLoader(Stream(), batch_size=4), of_the_hub().to_iterable_dataset(),
    ],
    ids=["pair", "arrays", "tensors", "subset", "pictures", "stream", "hub", "loader", "dicts", "streamed",
         "hub stream"],
)  # fmt: skip
def test_every_kind_holds_the_same_samples(given):
    found = as_data(given)
    assert found.x.dtype == torch.uint8
    assert torch.equal(found.x, X)
    assert torch.equal(found.y, Y)
    assert found.index.tolist() == list(range(30))


def test_class_names_come_with_the_data():
    assert as_data(Pictures()).classes == as_data(of_the_hub()).classes == tuple(NAMES)
    assert as_data(TENSORS).classes == ()


def test_a_name_and_a_split_give_the_part_that_is_meant():
    assert torch.equal(as_data("digits").x, DIGITS.test.x)
    assert torch.equal(as_data(DIGITS, "train", "train").y, DIGITS.train.y)
    assert torch.equal(as_data(DIGITS, "val", "val").y, DIGITS.val.y)


class Augmented(Pictures):
    def __getitem__(self, i):
        return torch.rand(1, 8, 8), 0


class Broken(Pictures):
    def __getitem__(self, i):
        raise KeyError("x")


class Missing(Pictures):
    def __getitem__(self, i):
        if i > 2:
            raise IndexError
        return super().__getitem__(i)


class Sizes(Pictures):
    def __getitem__(self, i):
        return torch.zeros(1, 8 + i, 8), i % 2


class Palette(Pictures):
    def __getitem__(self, i):
        return Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P"), 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (DataLoader(TENSORS, shuffle=True), "pass shuffle=False"),
        (DataLoader(TENSORS, sampler=SubsetRandomSampler(range(9))), "pass shuffle=False"),
        (of_the_hub().with_transform(lambda rows: rows | {"image": [torch.rand(1, 8, 8)]}), "random augmentation"),
        (Augmented(), "random augmentation"),
        (DataLoader(Augmented()), "random augmentation"),
        (Broken(), "cannot be read: KeyError"),
        (DataLoader(Broken()), "cannot be read: KeyError"),
        (Missing(), "cannot be read: IndexError. Has it fewer samples than its length says?"),
        (Sizes(), "different sizes"),
        (Palette(), "mode P"),
        (TensorDataset(X.float() / 127.5 - 1, Y), "normalises"),
        (TensorDataset(X), r"expected \(image, label\)"),
        (of_the_hub().rename_column("label", "answer"), "gives image, answer"),
        (DataLoader(TensorDataset(X.flatten(1), Y)), r"expected \(N, C, H, W\)"),
        ((X, Y[:3]), "one label for each"),
        (TensorDataset(X[:0], Y[:0]), "is empty"),
        ("no such thing", "unknown data set"),
        (3, "must be Data"),
    ],
)
def test_what_cannot_be_samples_is_refused_in_a_sentence(given, said):
    with pytest.raises(UserError, match=said):
        as_data(given)


@pytest.mark.parametrize("kind", [Stream(), Pictures(), Floats(), DataLoader(Floats(), batch_size=4), of_the_hub()])
def test_what_does_not_fit_in_memory_goes_to_a_file(monkeypatch, kind):
    whole = as_data(kind)
    monkeypatch.setenv(mapped.VARIABLE, "500")
    found = as_data(kind)
    assert mapped.is_mapped(found.x)
    assert not mapped.is_mapped(whole.x)
    for name in ("x", "y", "index"):
        assert torch.equal(getattr(whole, name), getattr(found, name)), name
    assert found.classes == whole.classes


@pytest.mark.parametrize("size", ["500", ""])
def test_values_are_looked_at_in_a_file_too(monkeypatch, size):
    monkeypatch.setenv(mapped.VARIABLE, size)
    with pytest.raises(UserError, match=r"run from -2 to 2: expected \[0, 1\]. If its transform"):
        as_data(Floats(-2.0, 2.0))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        as_data(Floats(0.0, float("nan")))
    rounded = as_data(Floats(-1e-7, 1 + 1e-7))
    assert mapped.extremes(rounded.x)[0] >= 0


@pytest.mark.parametrize("size", ["500", ""])
def test_a_source_that_ends_early_is_refused(monkeypatch, size):
    monkeypatch.setenv(mapped.VARIABLE, size)
    for given in (Short(31), DataLoader(Short(31), batch_size=4)):
        with pytest.raises(UserError, match=r"ends after 30 samples, though its length is 31: .*Mend the source"):
            as_data(given)
    with pytest.raises(UserError, match=r"gives 30 samples, though its length is 29"):
        as_data(Short(29))
    assert len(as_data(Short(30))) == 30
    assert len(as_data(DataLoader(TENSORS, batch_size=7, drop_last=True))) == 28
