"""The examples of docs/how-to/own-loop.md that need a package which is not a dependency: run where it is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.test_docs import DOCS, blocks
from torch import nn

PAGE = DOCS / "how-to" / "own-loop.md"


def shown(title):
    """What the block of that title defines."""
    [text] = [block.text for block in blocks(PAGE) if block.title == title]
    names = {"__name__": "shown"}
    exec(compile(text, title, "exec", dont_inherit=True), names)
    return SimpleNamespace(**names)


def data():
    return torch.randn(64, 20), torch.arange(64) % 4


@pytest.mark.filterwarnings("ignore")  # of the package itself
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    net = shown("lightning_module.py").Net()
    before = [p.detach().clone() for p in net.parameters()]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, loader)
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert trainer.callback_metrics["loss"].isfinite()


@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(20, 4)

        def forward(self, pixel_values, labels=None):
            return transformers.modeling_outputs.ImageClassifierOutput(logits=self.net(pixel_values))

    net, (x, y) = Net(), data()
    before = net.net.weight.detach().clone()
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = transformers.Trainer(
        net, arguments, train_dataset=rows, compute_loss_func=shown("trainer_loss.py").compute_loss
    )
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, net.net.weight)


def test_what_the_page_shows_is_what_it_was_written_for():
    criterion = shown("trainer_loss.py").criterion
    z, y = torch.randn(5, 4), torch.arange(5) % 4
    loss = shown("trainer_loss.py").compute_loss(SimpleNamespace(logits=z), y)
    torch.testing.assert_close(loss, criterion(z, y))
