"""Every attack compared with foolbox's, on two MNIST networks trained with holdfast: SCE, and adversarial training.

    HOLDFAST_MNIST=data/mnist python benchmarks/bench_attacks.py [--samples 200] [--only fmn,cw] [--network sce-seed0]

Needs foolbox (``pip install '.[bench]'``). For attacks at a fixed eps: how many correctly classified samples each side
breaks, and how many only one side breaks; eps is the median size that ``fmn`` finds. For minimal-norm attacks: the
median size, the share of samples on which one side's is more than 5% larger, and how many break at 0.8, 1 and 1.2 times
that eps. Passes are forward + backward passes per sample. A ~ marks a similar attack, where foolbox lacks the same one;
peers.py has the pairs and their settings. Goal: no attack is weaker than its counterpart.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.attacks import peers
from tests.faults import calibration_nets

from holdfast.data import pixels
from holdfast.threat import Threat

NETWORKS = ("sce-seed0", "at0.1-seed0")
FACTORS = (0.8, 1.0, 1.2)  # of eps, at which success is counted
LARGER = 1.05


def load(name: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, x, y): the network, trained if necessary, and test samples that it classifies correctly."""
    (plan,) = [plan for plan in calibration_nets.mnist() if plan.name == name]
    net = calibration_nets.network(plan, "mnist")
    x, y = pixels(net.split.test.x), net.split.test.y
    with torch.no_grad():
        correct = torch.nonzero(peers.Network(net.model)(x).argmax(1) == y)[:samples, 0]
    return net.model, x[correct], y[correct]


def usual_eps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The eps of each norm at which about half of the samples break."""
    pairs = {norm: peers.Pair("fmn", norm, "", {"steps": 100}) for norm in peers.ALL}
    return {norm: peers.run_ours(pair, model, x, y, peers.widest(norm, x)).median for norm, pair in pairs.items()}


def line(pair: peers.Pair, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> str:
    """One row of the table."""
    fixed, n = pair in peers.FIXED, len(x)
    threat = Threat(pair.norm, eps) if fixed else peers.widest(pair.norm, x)
    ours, theirs = (run(pair, model, x, y, threat) for run in (peers.run_ours, peers.run_theirs))
    if fixed:
        a, b = ours.broken, theirs.broken
        text = (
            f"{int(a.sum()):4} {int(b.sum()):4}  only ours {int((a & ~b).sum()):3}  only theirs {int((b & ~a).sum()):3}"
        )
    else:
        worse, better = (int((p.size > LARGER * q.size).sum()) / n for p, q in ((ours, theirs), (theirs, ours)))
        breaks = " ".join(
            f"{int((ours.size <= factor * eps).sum())}:{int((theirs.size <= factor * eps).sum())}" for factor in FACTORS
        )
        text = f"{ours.median:7.4f} {theirs.median:7.4f}  larger {worse:4.0%}, theirs {better:4.0%}  break {breaks}"
    cost = "  ".join(f"{run.forwards / n:.0f}+{run.backwards / n:.0f} in {run.seconds:.1f} s" for run in (ours, theirs))
    return f"{pair.ours:12} {pair.norm:5}{' ' if pair.twin else '~'}{pair.label:59} {text:62} {cost}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", default="", help="comma-separated keys of ATTACKS")
    parser.add_argument("--network", choices=NETWORKS, help="only this network")
    arguments = parser.parse_args()
    try:
        import foolbox
    except ImportError:
        raise SystemExit("foolbox is not installed: pip install -c constraints.txt -e '.[bench]'.") from None
    if calibration_nets.MNIST not in os.environ:
        raise SystemExit(f"{calibration_nets.MNIST} must name MNIST's parquet folder, such as data/mnist.")
    torch.set_num_threads(1)
    only = [name for name in arguments.only.split(",") if name]
    pairs = [pair for pair in (*peers.FIXED, *peers.LEAST) if not only or pair.ours in only]
    for name in [arguments.network] if arguments.network else NETWORKS:
        model, x, y = load(name, arguments.samples)
        eps = usual_eps(model, x, y)
        print(f"{name}: {len(x)} samples, eps {', '.join(f'{k} {v:.3g}' for k, v in eps.items())}; ours, foolbox's")
        for pair in track(pairs, description=name, transient=True, disable=not sys.stdout.isatty()):
            print(line(pair, model, x, y, eps[pair.norm]), flush=True)
    print(f"foolbox {foolbox.__version__}, torch {torch.__version__}, one thread")


if __name__ == "__main__":
    main()
