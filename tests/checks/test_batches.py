"""The audit and the region's measures work in batches, so that large images fit in memory."""

import pytest
import torch
from torch import nn

from holdfast import evaluate, region
from holdfast.checks import audit
from holdfast.data import Data
from holdfast.queries import default_batch_size


class Recording(nn.Module):
    """Two classes by the mean of the image, which remembers how many images it was given at once."""

    def __init__(self):
        super().__init__()
        self.most, self.conv = 0, nn.Conv2d(3, 2, 64)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) / 100)
            self.conv.bias.copy_(torch.tensor([-61.44, 61.44]))

    def forward(self, x):
        self.most = max(self.most, len(x))
        return self.conv(x).flatten(1)

    def __deepcopy__(self, memo):
        copy = Recording()
        copy.load_state_dict(self.state_dict())
        return copy


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_no_check_and_no_measure_passes_more_images_at_once_than_a_batch(shift, unproved):
    """So that large images fit in memory, whatever the number of samples that a check looks at; shift: some survive."""
    torch.manual_seed(0)
    y = torch.arange(2).repeat(40)
    middle = 0.495 + torch.where(y == 0, 0.005 + shift, -0.005 - shift)
    x = middle.view(-1, 1, 1, 1) + 0.01 * torch.rand(80, 3, 64, 64)
    data, model = Data(x, y, torch.arange(80)), Recording()
    assert default_batch_size(x) == 16
    evaluation = evaluate(model, data, "linf:0.01", "quick")
    assert bool(evaluation.robust.any()) == bool(shift)
    audited = audit(model, data, evaluation, transfer_source=x + 0.001)
    assert sum(finding.status != "not run" for finding in audited.findings) > 20
    region.measure(model, x, y, evaluation.x_adv, evaluation.threat)
    assert model.most == 16
