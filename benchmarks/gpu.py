"""The stages of benchmarks/gpu.sh, which says what they are for; each writes OUT/STAGE.json when it is finished.

OUT=build/gpu DEVICE=cuda python benchmarks/gpu.py tests | agreement | throughput | cifar10 | summary
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.accelerator import synchronisations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from holdfast import data, evaluate, fit, models
from holdfast.attacks import ATTACKS
from holdfast.data import Data, Split
from holdfast.environment import environment
from holdfast.errors import UserError
from holdfast.experiments.recipes import cifar10 as cifar10_recipe
from holdfast.io import write_atomic
from holdfast.losses import negative_margin, sce
from holdfast.noise import Noise
from holdfast.objectives import Schedule, adversarial, standard
from holdfast.outputs import as_outputs
from holdfast.threat import Threat
from holdfast.train import FitConfig

OUT, DEVICE = Path(os.environ.get("OUT", "build/gpu")), os.environ.get("DEVICE", "cuda")
TINY = bool(os.environ.get("TINY"))
CIFAR = (3, 32, 32)
THREAT = Threat("linf", 8 / 255)
MARGIN = 20.0  # seconds that a stage leaves for its last lines


def tests() -> dict[str, Any]:
    """tests/device on the real device: attacks, objectives in float32 and bf16, suites, audit, region, certificates."""
    report = OUT / "tests.xml"
    chosen = ["-k", "fgsm-linf or standard or mlp"] if TINY else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "tests/device",
            *chosen,
        ],
        env={**os.environ, "HOLDFAST_DEVICE": DEVICE},
    )
    if done.returncode not in (0, 1):  # 1: some tests failed, which is a result
        sys.exit(done.returncode)
    suite = ElementTree.parse(report).getroot()[0]
    failed = {
        case.attrib["name"]: (case.find("failure") if case.find("failure") is not None else case.find("error"))
        for case in suite.iter("testcase")
    }
    named = {name: problem.attrib.get("message", "")[:500] for name, problem in failed.items() if problem is not None}
    return {"tests": int(suite.attrib["tests"]), "seconds": float(suite.attrib["time"]), "failed": named}


def agreement() -> dict[str, Any]:
    """Digits networks, trained on the device and evaluated on both; and one that is trained on both."""
    split, threat = data.load("digits", limit_train=100 if TINY else 0), Threat("linf", 0.1)
    config = FitConfig(epochs=1 if TINY else 15, batch_size=64, lr=3e-3)
    test = split.test.take(slice(0, 8 if TINY else 128))
    suite = "quick" if TINY else "standard"
    found: dict[str, Any] = {"noise": _same_noise(), "n": len(test)}
    for name, objective in (("sce", standard(sce)), ("adversarial", adversarial(sce, threat, steps=3))):
        there = models.build("convnet:width=8", split.shape, 10)
        fit(there, split.train, split.val, objective, config, device=DEVICE)
        net = copy.deepcopy(there).to("cpu")
        (home, home_seconds), (away, away_seconds) = (
            _timed(lambda m=m: evaluate(m, test, threat, suite)) for m in (net, there)
        )
        differs = home.robust != away.robust
        found[name] = {
            "robust": [float(side.robust.double().mean()) for side in (home, away)],
            "clean_differs": int((home.clean != away.clean).sum()),
            "robust_differs": home.index[differs].tolist(),
            "margins_where_it_differs": [side.margin_adv[differs].tolist() for side in (home, away)],
            "largest_difference_of_clean_margins": float((home.margin - away.margin).abs().max()),
            "certified_differs": None if home.certified is None else int((home.certified != away.certified).sum()),
            "seconds": [home_seconds, away_seconds],
        }
    fitted = [
        fit(
            models.build("convnet:width=8", split.shape, 10),
            split.train,
            split.val,
            standard(sce),
            config,
            device=where,
        )
        for where in ("cpu", DEVICE)
    ]
    found["loss of training"] = [[line["loss"] for line in one.history] for one in fitted]
    return found


def _same_noise() -> bool:
    """Whether random starts are bit for bit the same on both."""
    index = torch.arange(64)
    here, there = Noise(3, index), Noise(3, index.to(DEVICE))
    drawn = [
        (noise.bits((99,)), noise.uniform((99,)), noise.sign((99,)), noise.integers(7, (99,)))
        for noise in (here, there)
    ]
    return all(torch.equal(a, b.cpu()) for a, b in zip(*drawn, strict=True))


def throughput() -> dict[str, Any]:
    """Images a second, the share of the largest rate of a product of matrices, and how often the host waits."""
    torch.set_float32_matmul_precision("highest")
    peak = {str(dtype).removeprefix("torch."): _matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    n, batch, name = (16, 8, "preactresnet8") if TINY else (10_000, 500, "preactresnet18")
    images = Data(_random_images(n), torch.arange(n) % 10, torch.arange(n))
    flops = _flops(name)
    found: dict[str, Any] = {"peak_tflops": peak, "model": name, "gflop_per_image_forward_and_backward": flops / 1e9}
    objectives: dict[str, tuple[Schedule, int]] = {
        "standard": (standard(sce), 1),
        "adversarial": (adversarial(sce, THREAT, steps=3), 4),
    }
    for precision in ("no", "bf16"):
        for what, (objective, passes) in objectives.items():
            for size in (batch,) if TINY else (128, batch):
                config = FitConfig(
                    epochs=2, batch_size=size, optimizer="sgd", lr=0.1, pad=4, flip=True, precision=precision
                )
                seconds, waits = _second_epoch(name, images, objective, config)
                rate = n / seconds
                of = peak["bfloat16" if precision == "bf16" else "float32"]
                found[f"{what}, {precision}, batch {size}"] = {
                    "images_per_second": round(rate),
                    "share_of_peak": round(rate * passes * flops / 1e12 / of, 4),
                    "waits_per_step": waits,
                }
    model = models.build(name, CIFAR, 10).to(DEVICE).eval()
    x, y = data.pixels(images.x[:batch]).to(DEVICE), images.y[:batch].to(DEVICE)
    y = as_outputs(model(x)).logits.argmax(1)  # all are right, so that there is work
    for attack, steps in (("pgd", 10), ("apgd", 10), ("fmn", 10), ("square", 20)):
        for norm in ("linf", "l2"):
            threat = Threat(norm, 1 / 255 if norm == "linf" else 0.05)
            noise = Noise(0, torch.arange(batch, device=DEVICE))
            run = partial(ATTACKS[attack].attack, model, x, y, threat, score=negative_margin, noise=noise, steps=steps)
            with synchronisations() as seen:  # also the warm-up
                run()
            _, seconds = _timed(run)
            found[f"{attack}, {norm}"] = {
                "image_steps_per_second": round(batch * steps / seconds),
                "waits_per_call": seen.total(),
                "steps": steps,
            }
    return found


def _second_epoch(name: str, images: Data, objective: Schedule, config: FitConfig) -> tuple[float, float]:
    """(seconds of the second epoch, how often the host waits a step more than once an epoch)."""
    none = images.take(slice(0, 0))
    half = images.take(slice(0, len(images) // 2))
    counts = []
    for part in (half, images):
        with synchronisations() as seen:
            fitted = fit(models.build(name, CIFAR, 10), part, none, objective, config, device=DEVICE)
        counts.append(seen.total())
    steps = config.epochs * (len(images) - len(half)) / config.batch_size
    return fitted.history[-1]["seconds"], round((counts[1] - counts[0]) / max(steps, 1), 3)


def _matmul_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a product of large square matrices."""
    n = 256 if TINY else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    times = 2 if TINY else 20
    _timed(lambda: a @ a)
    _, seconds = _timed(lambda: [a @ a for _ in range(times)] and None)
    return 2 * n**3 * times / seconds / 1e12


def _flops(name: str) -> float:
    """Of one forward and one backward pass for one image."""
    model = models.build(name, CIFAR, 10)
    with FlopCounterMode(display=False) as counter:
        as_outputs(model(torch.rand(2, *CIFAR))).logits.sum().backward()
    return counter.get_total_flops() / 2


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    began = time.perf_counter()
    result = work()
    _wait()
    return result, time.perf_counter() - began


def _wait() -> None:
    if torch.device(DEVICE).type == "cuda":
        torch.cuda.synchronize()


def cifar10() -> dict[str, Any]:
    """The recipe, until the time is over: a checkpoint every ten seconds, so that the next call goes on."""
    began, limit = time.perf_counter(), float(os.environ.get("LIMIT", "600"))
    recipe = cifar10_recipe(os.environ.get("DATA", "cifar10")).comparison
    split, what = _cifar(recipe.data)
    config = replace(recipe.fit, checkpoint_seconds=10.0, **({"epochs": 2, "batch_size": 16} if TINY else {}))
    name = "preactresnet8" if TINY else recipe.model
    mean, std = data.standardisation(split.train)
    model = models.build(name, split.shape, 10, mean=mean, std=std)
    objective = adversarial(sce, THREAT, steps=3)

    def stop(line: str, done: int, total: int) -> None:
        used = time.perf_counter() - began
        print(f"{line}; {done} of {total} epochs after {used:.0f} s", flush=True)
        if done < total and used > limit - MARGIN:
            sys.exit(124)  # as timeout does: not finished

    fitted = fit(
        model,
        split.train,
        split.val,
        objective,
        config,
        val_threat=THREAT,
        out=OUT / "cifar10",
        device=DEVICE,
        progress=stop,
    )
    n = 4 if TINY else 1000
    evaluation, seconds = _timed(
        lambda: evaluate(model, split.test.take(slice(0, n)), THREAT, "quick", trained_with=sce)
    )
    return {
        "data": what,
        "epochs": list(fitted.history),
        "seconds_of_training": fitted.seconds,
        "clean": float(evaluation.clean.double().mean()),
        "robust_quick": float(evaluation.robust.double().mean()),
        "n": n,
        "seconds_of_evaluation": seconds,
    }


def _cifar(name: str) -> tuple[Split, str]:
    """The data, or random images of the same shape, and what it is."""
    if not TINY:
        try:
            return data.load(name), name
        except UserError as error:
            print(error)
    n = 64 if TINY else 50_000
    parts = {}
    for part, size in (("train", n), ("val", n // 10), ("test", 1000)):
        parts[part] = Data(_random_images(size), torch.arange(size) % 10, torch.arange(size))
    classes = tuple(map(str, range(10)))
    return replace(data.load("digits"), **parts, classes=classes), "random images: the times alone mean something"


def _random_images(n: int) -> Tensor:
    """The same ones at every call, as a run that is resumed needs them."""
    return torch.randint(256, (n, *CIFAR), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def summary() -> None:
    """What there is, in a few lines."""
    for name in STAGES:
        path = OUT / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found is None:
            print(f"{name}: not finished")
        elif name == "tests":
            print(f"tests: {found['tests']} in {found['seconds']:.0f} s, failed: {sorted(found['failed']) or 'none'}")
        elif name == "agreement":
            apart = {key: found[key]["robust_differs"] for key in ("sce", "adversarial")}
            print(f"agreement: same noise: {found['noise']}; samples of {found['n']} that differ: {apart}")
        elif name == "throughput":
            for key, figure in found.items():
                print(f"throughput: {key}: {figure}")
        else:
            last = found["epochs"][-1]
            each, robust = f"{len(found['epochs'])} epochs, {last['seconds']} s each", found["robust_quick"]
            print(f"cifar10 on {found['data']}: {each}, robust {robust:.1%} by quick")


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "tests": tests, "agreement": agreement, "throughput": throughput, "cifar10": cifar10,
}  # fmt: skip


def main() -> None:
    """Run the stage that the command line names."""
    (name,) = sys.argv[1:]
    if name == "summary":
        summary()
        return
    found = STAGES[name]()
    text = json.dumps({"environment": environment(), "device": DEVICE, "tiny": TINY, **found}, indent=1)
    write_atomic(OUT / f"{name}.json", text)


if __name__ == "__main__":
    main()
