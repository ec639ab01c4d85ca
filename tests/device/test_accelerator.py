"""The pretended accelerator itself: it raises where devices mix, it counts what waits, and it computes as the CPU does.

What it is for: a mistake that a GPU would show must not pass here because the memory is the CPU's.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.accelerator import DeviceGenerator, is_real, on_host, synchronisations
from torch import nn

pytestmark = pytest.mark.skipif(is_real(), reason="of the pretended device")


@pytest.fixture
def x(device):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device)


MIXED = {
    "a sum": lambda x: x + torch.ones(4),
    "a sum, the CPU first": lambda x: torch.ones(3, 4) + x,
    "in place": lambda x: x.mul_(torch.ones(4)),
    "where": lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, x),
    "a product of matrices": lambda x: x @ torch.ones(4, 1),
    "a layer that stayed behind": lambda x: nn.Linear(4, 2)(x),
    "a convolution": lambda x: F.conv2d(x[None, None], torch.ones(1, 1, 2, 2)),
    "cat": lambda x: torch.cat([x, torch.ones(3, 4)]),
    "a number that is no operand": lambda x: F.pad(x, (1, 1)).index_select(0, torch.tensor(1)),
    "a loss": lambda x: F.cross_entropy(x, torch.zeros(3, dtype=torch.int64)),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "an index of the device into the CPU": lambda x: torch.ones(5)[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "values of the CPU at an index": lambda x: x.__setitem__(torch.tensor([0]), torch.ones(1, 4)),
    "the CPU's generator": lambda x: torch.randn(2, device=x.device, generator=torch.Generator()),
    "equal": lambda x: torch.equal(x, torch.ones(3, 4)),
    "an optimiser whose state stayed behind": lambda x: torch._foreach_add_([x], [torch.ones(3, 4)]),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_it_raises_where_devices_mix(mixed, x):
    with pytest.raises(RuntimeError, match="device"):
        mixed(x)


def test_it_refuses_numpy(x):
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_what_cuda_allows_is_allowed(x):
    """Numbers of dimension 0, and indices on the CPU."""
    number = torch.tensor(2.0)
    assert torch.equal((x * number).cpu(), x.cpu() * 2)
    assert torch.equal(torch.where(x > 0, x, number).cpu(), x.cpu().where(x.cpu() > 0, number))
    assert torch.equal(x[torch.tensor([2, 0])].cpu(), x.cpu()[[2, 0]])
    x[torch.tensor([1])] = 0.0
    assert torch.equal(x[1].cpu(), torch.zeros(4))


WAITS = {  # how often the host waits
    "item": (1, lambda x: x.sum().item()),
    "float": (1, lambda x: float(x[0, 0])),
    "int": (1, lambda x: int(x.argmax())),
    "bool": (1, lambda x: bool((x > 0).any())),
    "if": (1, lambda x: 1 if x.isfinite().all() else 0),
    "cpu": (1, lambda x: x.cpu()),
    "tolist": (1, lambda x: x.tolist()),
    "to the device": (1, lambda x: torch.ones(2).to(x.device)),
    "a list to the device": (1, lambda x: torch.tensor([1, 2], device=x.device)),
    "nonzero": (1, lambda x: torch.nonzero(x > 0)),
    "a mask": (1, lambda x: x[x > 0]),
    "a mask, written": (2, lambda x: x.__setitem__(x > 0, x[0, 0].expand(int((x > 0).sum())))),  # how many, and where
    "masked_select": (1, lambda x: x.masked_select(x > 0)),
    "an index on the CPU": (1, lambda x: x[torch.tensor([0])]),
    "an index of no dimension": (1, lambda x: torch.arange(9)[x.argmax()]),
    "equal": (1, lambda x: torch.equal(x, x)),
    "unique": (1, lambda x: x.unique()),
    "repeats": (1, lambda x: x.flatten().repeat_interleave(torch.ones(12, dtype=torch.int64, device=x.device))),
    "for": (3, lambda x: [float(row.sum()) for row in x]),
    # and what does not wait
    "arithmetic": (0, lambda x: (x * 2 + 1).exp().sum(1).sort().values.clamp(0, 1)),
    "a number at a mask": (0, lambda x: x.__setitem__(x > 0, 0.0)),
    "an index on the device": (0, lambda x: x[x.argmax(1) % 3]),
    "factories": (0, lambda x: torch.zeros_like(x) + torch.arange(4, device=x.device) + torch.rand(4, device=x.device)),
    "to the device, not blocking": (0, lambda x: torch.ones(2).to(x.device, non_blocking=True)),
    "views and sizes": (0, lambda x: x[1:, None].expand(-1, 2, -1).flatten(1)[len(x) - 2 :, ::2].clone()),
}


@pytest.mark.parametrize(("expected", "work"), WAITS.values(), ids=WAITS)
def test_it_counts_what_waits(expected, work, x):
    with synchronisations() as seen:
        work(x)
    assert seen.total() == expected, seen


def test_the_cpu_alone_waits_for_nothing():
    with synchronisations() as seen:
        x = torch.randn(3)
        assert x[x > 0].tolist() == [v for v in x.tolist() if v > 0]
    assert seen.total() == 0


def test_a_forward_and_a_backward_pass_are_those_of_the_cpu(device):
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)
    )
    there, x = copy.deepcopy(net).to(device), torch.rand(5, 1, 4, 4)
    x.requires_grad_()
    x_there = x.detach().to(device).requires_grad_()
    for model, images in ((net, x), (there, x_there)):
        F.cross_entropy(model(images), torch.zeros(5, dtype=torch.int64, device=images.device)).backward()
    assert x_there.grad.device.type == device.type
    assert torch.equal(x_there.grad.cpu(), x.grad)
    for here, away in zip((*net.parameters(), *net.buffers()), (*there.parameters(), *there.buffers()), strict=True):
        assert torch.equal(away.detach().cpu(), here)
        assert here.grad is None or torch.equal(away.grad.cpu(), here.grad)


def test_views_share_memory_and_copies_do_not(device):
    x = torch.zeros(2, 3, device=device)
    x.view(6)[::2] += 1.0
    x.clone().fill_(9.0)
    copy.deepcopy(x).fill_(9.0)
    x.to(device).t()[0] = 5.0
    assert x.tolist() == [[5.0, 0.0, 1.0], [5.0, 1.0, 0.0]]
    assert on_host(x).data_ptr() == x.data_ptr()


def test_generators(device):
    """The device's own stream: seeded, forked, and the same as that of the CPU under the same seed."""
    torch.manual_seed(3)
    expected = torch.randn(4), torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device=device).cpu(), expected[0])
    assert torch.equal(torch.randn(4), expected[0]), "the CPU's stream does not move when the device draws"
    with torch.random.fork_rng([device], device_type=device.type):
        torch.randn(7, device=device)
    assert torch.equal(torch.rand(2, device=device).cpu(), expected[1])
    own = DeviceGenerator().manual_seed(3)
    assert torch.equal(torch.randn(4, device=device, generator=own).cpu(), expected[0])
    dropped = F.dropout(torch.ones(1000, device=device))
    assert 300 < int((dropped == 0).sum()) < 700


def test_autocast_is_that_of_cuda(device):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).to(device)
    x, y = torch.rand(2, 1, 4, 4, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = net(x)
        assert logits.dtype == net[0](x).dtype == torch.bfloat16
        assert F.cross_entropy(logits, y).dtype == logits.exp().dtype == torch.float32
        assert (logits + 1).dtype == torch.bfloat16
        with torch.autocast(device.type, enabled=False):
            assert net(x).dtype == torch.float32
    logits.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
