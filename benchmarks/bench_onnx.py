"""A public trained network through the ONNX converter: compared with onnxruntime, and attacked.

    pip download --no-deps rapidocr-onnxruntime==1.4.4      # Apache-2.0, 15 MB
    python benchmarks/bench_onnx.py rapidocr_onnxruntime-1.4.4-py3-none-any.whl      # or the .onnx in it

The network decides whether a line of text is upright or upside down (48 x 192 pixels in [-1, 1], BGR; the images here
are grey, so the order of the channels does not matter). Goal: within 1e-5 of onnxruntime.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from goals import goal
from holdfast.data import Data
from holdfast.evaluation import evaluate
from holdfast.importers.model_file import ModelSource, open_model
from holdfast.importers.onnx import load_onnx
from holdfast.threat import Threat

NAME = "ch_ppocr_mobile_v2.0_cls_infer.onnx"
WORDS = (
    "holdfast", "margins", "Kiel 2024", "robust", "GRADIENT", "upright text", "Nordsee", "classifier", "projection",
    "Invoice 7719", "adversary", "logit", "Platform 4", "Hamburg", "softmax", "certified", "Bremen Hbf", "seventeen",
    "witness", "Eckernbrook", "label", "Way out", "Ferry 12:40", "threshold", "Exit only", "mountain", "Total 48.50",
    "fireplace", "Gate B23", "yesterday", "Parking", "Quarterly",
)  # fmt: skip
GOAL, PAIRS, EPS = 1e-5, 32, 4 / 255


def main(path: str | None = None) -> None:
    if path is None or not Path(path).is_file():
        sys.exit("give the path of the wheel; to get it: pip download --no-deps rapidocr-onnxruntime==1.4.4")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(path)
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                inside = next(name for name in wheel.namelist() if name.endswith(NAME))
                file = Path(wheel.extract(inside, folder))
        compare_and_attack(file)


def compare_and_attack(file: Path) -> None:
    began = time.perf_counter()
    model = open_model(ModelSource(str(file), input_range=(-1.0, 1.0)))
    print(f"{file.name}: opened in {time.perf_counter() - began:.2f} s; batches {model.inner.batching}")
    net = load_onnx(file, strip_softmax=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    x, y = rendered()
    noise = torch.rand(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    for label, images in (("random images", noise), ("rendered text", x)):
        z = 2 * images - 1
        began = time.perf_counter()
        with torch.no_grad():
            ours = net(z).numpy()
        between = time.perf_counter()
        theirs = session.run(None, {session.get_inputs()[0].name: z.numpy()})[0]
        ended = time.perf_counter()
        largest = float(np.abs(ours - theirs).max())
        word, same = "meets" if largest <= GOAL else "misses", (ours.argmax(1) == theirs.argmax(1)).mean()
        print(
            f"{label}, {len(z)}: max |difference of probabilities| {largest:.1e} ({word} {GOAL:g}), same class on "
            f"{same:.1%}; {between - began:.2f} s, onnxruntime {ended - between:.2f} s"
        )
        goal(f"difference of probabilities, {label}", largest, GOAL, peer="onnxruntime")
    with torch.no_grad():
        correct = model(x).argmax(1) == y
    for label, rows in (("upright", y == 0), ("rotated", y == 1)):
        print(f"clean accuracy, {label}: {float(correct[rows].double().mean()):.1%} of {int(rows.sum())}")
    evaluation = evaluate(model, Data(x, y, torch.arange(len(y))), Threat("linf", EPS), suite="quick")
    print(
        f"quick suite, linf {EPS * 255:.0f}/255: clean {float(evaluation.clean.double().mean()):.1%}, robust at most "
        f"{float(evaluation.robust.double().mean()):.1%}; {evaluation.forwards:,} forward and "
        f"{evaluation.backwards:,} backward passes in {evaluation.seconds:.1f} s"
    )


def rendered() -> tuple[Tensor, Tensor]:
    """(x, y): each word upright (0) and turned by 180 degrees (1), grey, (2 PAIRS, 3, 48, 192) in [0, 1]."""
    source = np.random.default_rng(0)
    images, labels = [], []
    for word in WORDS[:PAIRS]:
        page = Image.new("L", (192, 48), int(source.integers(200, 256)))
        draw, size = ImageDraw.Draw(page), 36
        while draw.textlength(word, ImageFont.load_default(size)) > 184:
            size -= 1
        ink = int(source.integers(0, 80))
        draw.text((96, 24), word, fill=ink, font=ImageFont.load_default(size), anchor="mm")
        for label, image in ((0, page), (1, page.rotate(180))):
            images.append(torch.from_numpy(np.array(image)).float() / 255)
            labels.append(label)
    return torch.stack(images)[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
