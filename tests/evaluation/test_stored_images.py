"""Images in a file: the answers are those of images in memory, and an evaluation that was killed resumes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tests.evaluation.helpers import FEW, THREAT, Interrupt, case, differing_columns, interrupt_after, toy

from holdfast import evaluate, evaluate_network, mapped
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import distributed, load_x_adv
from holdfast.evaluation.checkpoint import images_file
from holdfast.io import load_tensors


def in_a_file(samples: Data) -> Data:
    return replace(samples, x=mapped.stored(samples.x))


def counts(evaluation):
    return [(s.name, s.attacked, s.broken, s.outside) for s in evaluation.stages]


def tensors_of(evaluation):
    found = {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same(a, b):
    assert counts(a) == counts(b)
    assert tensors_of(a).keys() == tensors_of(b).keys()
    for name, column in tensors_of(a).items():
        assert torch.equal(column, tensors_of(b)[name]), name


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_images_in_a_file_give_the_same_answers(tmp_path, kind):
    net, samples, threat = case(n=40)
    if kind == torch.uint8:
        samples = replace(samples, x=(samples.x * 255).to(torch.uint8))
    whole = evaluate(net, samples, threat, FEW)
    path = tmp_path / "evaluation.safetensors"
    for checkpoint in (None, path):
        found = evaluate(net, in_a_file(samples), threat, FEW, checkpoint=checkpoint, key="k")
        assert mapped.is_mapped(found.x_adv)
        assert_same(whole, found)
    assert "x_adv" not in load_tensors(path, "evaluation checkpoint", 5)[0]
    assert torch.equal(load_x_adv(path), whole.x_adv)


def test_the_final_answer_is_the_same_and_is_read_back(tmp_path):
    net, samples, threat = case(n=40)
    few = {"s": 1.0, "cache": tmp_path, "key": "k"}
    whole = evaluate_network(net, samples, threat, FEW, s=1.0)
    for _ in range(2):  # the second one reads what the first has written
        found = evaluate_network(net, in_a_file(samples), threat, FEW, **few)
        assert_same(whole.evaluation, found.evaluation)
        assert whole.verdict() == found.verdict()
        assert whole.region == found.region
    (tmp_path / "result.safetensors").unlink()
    (tmp_path / "audit.safetensors").unlink()
    assert_same(whole.evaluation, evaluate_network(net, in_a_file(samples), threat, FEW, **few).evaluation)


def test_a_candidate_of_a_smaller_eps_is_tried(tmp_path):
    net, samples, threat = case(n=40)
    samples = in_a_file(samples)
    first = evaluate_network(net, samples, replace(threat, eps=threat.eps / 2), FEW)
    found = evaluate_network(net, samples, threat, FEW, smaller=first)
    assert found.evaluation.stages[-3].name == "candidates"
    assert bool(found.evaluation.robust[first.evaluation.broken_by >= 0].any()) is False


def test_an_evaluation_that_was_killed_resumes(unproved, save_every_batch, tmp_path):
    net, samples, threat = case(n=30)
    few, path = {"suite": FEW, "batch_size": 8, "key": "k"}, tmp_path / "checkpoint.safetensors"
    whole = evaluate(net, samples, threat, **few)
    interruptions, resumed = 0, None
    while resumed is None:
        try:
            stored = in_a_file(samples)
            resumed = evaluate(net, stored, threat, **few, checkpoint=path, progress=interrupt_after(1))
        except Interrupt:
            interruptions += 1
            assert interruptions < 60, "no progress"
    assert interruptions > 8
    assert differing_columns(whole, resumed) == []


def test_images_newer_than_the_columns_are_settled(unproved, save_every_batch, tmp_path):
    """After a kill, an image that fools counts, and one that was lost does not."""
    few, path = {"suite": FEW, "batch_size": 3, "key": "k"}, tmp_path / "checkpoint.safetensors"
    model, samples = toy()
    whole = evaluate(model, samples, THREAT, **few)
    broken, robust = (torch.nonzero(rows)[0, 0] for rows in (whole.broken_by >= 0, whole.robust))
    with pytest.raises(Interrupt):
        evaluate(toy()[0], in_a_file(samples), THREAT, **few, checkpoint=path, progress=interrupt_after(6))
    x_adv = mapped.opened(images_file(path), writable=True)
    x_adv[broken] = 0.9 + x_adv[broken]  # outside of the threat
    mapped.flush(x_adv)
    resumed = evaluate(toy()[0], in_a_file(samples), THREAT, **few, checkpoint=path)
    assert bool(resumed.robust[broken])
    assert torch.equal(resumed.x_adv[broken], samples.x[broken])
    assert float(resumed.margin_adv[broken]) == float(resumed.margin[broken])
    assert bool(resumed.robust[robust])
    broken_by = [int((resumed.broken_by == k).sum()) for k in range(1, len(resumed.stages))]
    assert broken_by == [stage.broken for stage in resumed.stages[1:]]
    again = evaluate(toy()[0], in_a_file(samples), THREAT, **few, checkpoint=path)
    assert_same(resumed, again)


def test_a_checkpoint_of_images_in_memory_is_continued_in_a_file_and_back(unproved, save_every_batch, tmp_path):
    few, path = {"suite": FEW, "batch_size": 3, "key": "k"}, tmp_path / "checkpoint.safetensors"
    model, samples = toy()
    whole = evaluate(model, samples, THREAT, **few)
    with pytest.raises(Interrupt):
        evaluate(toy()[0], samples, THREAT, **few, checkpoint=path, progress=interrupt_after(2))
    with pytest.raises(Interrupt):
        evaluate(toy()[0], in_a_file(samples), THREAT, **few, checkpoint=path, progress=interrupt_after(2))
    assert images_file(path).exists()
    assert differing_columns(whole, evaluate(toy()[0], samples, THREAT, **few, checkpoint=path)) == []


def test_a_checkpoint_without_its_images_is_refused(tmp_path):
    model, samples = toy()
    path = tmp_path / "checkpoint.safetensors"
    evaluate(model, in_a_file(samples), THREAT, FEW, checkpoint=path, key="k")
    content = images_file(path).read_bytes()
    for damaged in (content[:-1], b"nothing", None):
        images_file(path).unlink()
        if damaged is not None:
            images_file(path).write_bytes(damaged)
        with pytest.raises(UserError, match=r"x_adv\.npy cannot be read .*Restore it"):
            evaluate(toy()[0], in_a_file(samples), THREAT, FEW, checkpoint=path, key="k")
        images_file(path).write_bytes(content)


def test_several_processes_refuse_images_in_a_file(monkeypatch):
    model, samples = toy()
    monkeypatch.setattr(distributed.Processes, "current", staticmethod(lambda: distributed.Processes(0, 2)))
    with pytest.raises(UserError, match=r"by one process alone.*HOLDFAST_MEMORY"):
        evaluate(model, in_a_file(samples), THREAT, FEW)
