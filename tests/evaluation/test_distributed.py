"""Several processes share one evaluation and return the result of a single one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.evaluation.helpers import EPS, PER_ATTACK, LinearModel

from holdfast.evaluation import Budget, evaluate
from holdfast.io import load_tensors
from holdfast.threat import Threat

STANDARD = """
import sys, torch
from torch import distributed
sys.path.insert(0, {tests!r})
from tests.evaluation.helpers import EPS, LinearModel
from holdfast.evaluation import evaluate
from holdfast.io import save_tensors
from holdfast.threat import Threat
from pathlib import Path
torch.set_num_threads(1)
distributed.init_process_group("gloo")
model = LinearModel()
out = Path({out!r})
e = evaluate(model, model.data(), Threat("linf", EPS), "standard", batch_size=16, checkpoint=out / "r.safetensors")
columns = {{name: getattr(e, name) for name in ("robust", "broken_by", "margin_adv", "x_adv", "pgd50")}}
passes = torch.tensor([e.forwards, e.backwards])
columns["passes"] = passes
save_tensors(out / f"answer{{distributed.get_rank()}}.safetensors", "answer", 1, columns, {{}})
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_work_and_give_the_result_of_one(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(STANDARD.format(tests=str(Path(__file__).parents[2]), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    for _ in range(2):  # the second time from the checkpoints of the first
        subprocess.run([*launch, str(script)], check=True, capture_output=True, timeout=300)
        model = LinearModel()
        one = evaluate(model, model.data(), Threat("linf", EPS), "standard", batch_size=16)
        for rank in (0, 1):
            answer = load_tensors(tmp_path / f"answer{rank}.safetensors", "answer", 1)[0]
            for name in ("robust", "broken_by", "margin_adv", "x_adv", "pgd50"):
                assert torch.equal(answer[name], getattr(one, name)), (rank, name)
            # each process runs the preflight and the clean pass; the proofs are shared
            assert abs(int(answer["passes"].sum()) - one.forwards - one.backwards) <= 2 * (400 + 128)


COLUMNS = """
import sys, torch
from torch import distributed
sys.path.insert(0, {tests!r})
from tests.evaluation.helpers import PER_ATTACK, small_mlp
from tests.evaluation.test_distributed import counts_of
from holdfast.evaluation import Budget, evaluate
from holdfast.io import save_tensors
from holdfast.threat import Threat
from pathlib import Path
torch.set_num_threads(1)
distributed.init_process_group("gloo")
net, split = small_mlp()
out = Path({out!r})
some = split.test.take(slice(0, 90))
few = {{"proofs": "branch", "budget": Budget(seconds=3600.0), "batch_size": 16}}
e = evaluate(net, some, Threat("linf", 0.1), PER_ATTACK[:2], **few, checkpoint=out / "r.safetensors")
columns = {{"certified": e.certified, "robust": e.robust, "x_adv": e.x_adv, "counts": counts_of(e), **e.attack_correct}}
save_tensors(out / f"answer{{distributed.get_rank()}}.safetensors", "answer", 1, columns, {{}})
distributed.destroy_process_group()
"""


def counts_of(evaluation):
    """What each method of proof did."""
    return torch.tensor([[cost.tried, cost.proved, cost.broken, cost.out_of_time] for cost in evaluation.proofs])


@pytest.mark.slow
def test_processes_agree_on_certificates_and_columns(mlp, some, tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(COLUMNS.format(tests=str(Path(__file__).parents[2]), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    few = {"proofs": "branch", "budget": Budget(seconds=3600.0), "batch_size": 16}
    one = evaluate(mlp, some, Threat("linf", 0.1), PER_ATTACK[:2], **few)
    wanted = {"certified": one.certified, "robust": one.robust, "counts": counts_of(one), **one.attack_correct}
    assert int(one.proofs[-1].proved) > 0
    assert int(one.proofs[-1].broken) > 0
    for _ in range(2):  # the second time from the checkpoints of the first
        subprocess.run([*launch, str(script)], check=True, capture_output=True, timeout=300)
        for rank in (0, 1):
            answers = load_tensors(tmp_path / f"answer{rank}.safetensors", "answer", 1)[0]
            assert set(answers) == {*wanted, "x_adv"}
            broken = ~answers["robust"] & one.clean
            with torch.no_grad():
                assert bool((mlp(answers["x_adv"][broken]).argmax(1) != some.y[broken]).all())
            for name, column in wanted.items():
                assert torch.equal(answers[name], column), (rank, name)
