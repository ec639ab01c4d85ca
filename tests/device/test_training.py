"""Training on the device: every objective, bf16, a resumed run, and not one wait a step."""

import copy

import pytest
import torch
from tests.accelerator import is_real, synchronisations

from holdfast import data, models, objectives
from holdfast.errors import UserError
from holdfast.losses import isce, sce
from holdfast.outputs import as_outputs
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit
from holdfast.train.validation import accuracy

THREAT = Threat("linf", 0.1)
OBJECTIVES = {
    "standard": objectives.standard(isce),
    "adversarial": objectives.adversarial(sce, THREAT, steps=6),
    "awp": objectives.adversarial(sce, THREAT, steps=1, awp=0.01),
    "fast": objectives.fast(sce, THREAT),
    "free": objectives.free(sce, THREAT, replays=2),
    "friendly": objectives.friendly(sce, THREAT, steps=6),
    "trades": objectives.trades(sce, THREAT, steps=2),
    "mart": objectives.mart(sce, THREAT, steps=2),
    "interval": objectives.interval(sce, THREAT),
}


@pytest.fixture(scope="module")
def split():
    return data.load("digits", limit_train=160)


def trained(split, device, objective="standard", *, images=128, out=None, val_threat=None, progress=None, **config):
    """(the network, its log)"""
    model = models.build("convnet:width=4", split.shape, 10)
    config = FitConfig(**{"epochs": 2, "batch_size": 32, "pad": 1, "flip": True, "ema": 0.5, "lr": 3e-3, **config})
    options = {} if progress is None else {"progress": progress}
    options |= {"device": str(device), "out": out, "val_threat": val_threat}
    fitted = fit(model, split.train.take(slice(0, images)), split.val, OBJECTIVES[objective], config, **options)
    return model, fitted.history


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_trains_as_on_the_cpu_and_no_step_waits(objective, precision, split, device):
    """Two more steps an epoch, and the host waits as often as before."""
    with synchronisations() as few:
        trained(split, device, objective, images=64, precision=precision)
    with synchronisations() as many:
        model, history = trained(split, device, objective, precision=precision)
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert many.total() == few.total(), many - few
    _, expected = trained(split, "cpu", objective, precision=precision)
    close = 2e-2 if precision == "bf16" else 1e-3 if is_real() else 1e-5  # autocast has other operators on the CPU
    for here, there in zip(history, expected, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=close)
        assert there["val"] == pytest.approx(here["val"], abs=0.2 if precision == "bf16" else 0.05 if is_real() else 0)


def test_sgd_and_robust_validation(split, device):
    settings = {"optimizer": "sgd", "lr": 0.05, "checkpoint": "best", "val_threat": THREAT}
    (_, here), (_, there) = (trained(split, where, **settings) for where in (device, "cpu"))
    assert here[-1]["val_robust"] == pytest.approx(there[-1]["val_robust"], abs=0.05 if is_real() else 0)


def test_an_epoch_waits_for_what_it_logs(split, device):
    with synchronisations() as one:
        trained(split, device, epochs=1)
    with synchronisations() as three:
        trained(split, device, epochs=3)
    # the order of the data; the loss; whether it and the weights are finite; accuracy on validation images
    assert three.total() - one.total() <= 2 * 5, three - one


class Stop(Exception):
    pass


def test_a_stopped_run_resumes_on_the_device(split, device, tmp_path):
    def stop(what, done, total):
        if done == 1:
            raise Stop

    settings = {"objective": "adversarial", "checkpoint_seconds": 0}
    whole, log = trained(split, device, **settings)
    with pytest.raises(Stop):
        trained(split, device, **settings, out=tmp_path, progress=stop)
    resumed, again = trained(split, device, **settings, out=tmp_path)
    assert [line["loss"] for line in again] == pytest.approx(
        [line["loss"] for line in log], rel=1e-3 if is_real() else 0
    )
    if not is_real():  # on CUDA sums are taken in no fixed order
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name].cpu(), tensor.cpu()), name


def test_a_run_may_change_the_device(split, device, tmp_path):
    """A checkpoint of the device is resumed on the CPU, and a fit goes where it is told, whatever came before it."""

    def stop(what, done, total):
        if done == 1:
            raise Stop

    for first, second in ((device, "cpu"), ("cpu", device)):
        out = tmp_path / f"to {torch.device(second).type}"
        with pytest.raises(Stop):
            trained(split, first, out=out, progress=stop, checkpoint_seconds=0)
        model, history = trained(split, second, out=out, checkpoint_seconds=0)
        assert len(history) == 2
        assert {p.device.type for p in model.parameters()} == {torch.device(second).type}
        assert accuracy(model, split.val.to(torch.device(second))) == history[-1]["val"]


def test_a_device_that_is_not_there_is_refused(split):
    """Not trained on another one without a word."""
    with pytest.raises(UserError, match="cuda:97"):
        trained(split, "cuda:97")


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_answers_as_on_the_cpu(name, device):
    """And in a step of training the host never waits."""
    model = models.build(name, (3, 16, 16), 4)
    x = torch.rand(2, 3, 16, 16)
    there, x_there = copy.deepcopy(model).to(device), x.to(device)
    with synchronisations() as seen:
        as_outputs(there(x_there)).logits.sum().backward()
    assert seen.total() == 0, seen
    with torch.no_grad():
        logits, expected = (
            as_outputs(net.eval()(images)).logits
            for net, images in ((copy.deepcopy(model).to(device), x_there), (model, x))
        )
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
