"""How many test images of a trained network are certified: one line of JSON, appended to certified.jsonl beside this.

python records/2026-11-29_certified-training/certify.py out/certified/mnist-0.3-seed0/model.safetensors \
  stepnet:slope=3,width=2 data/mnist linf:0.3 linear
python records/2026-11-29_certified-training/certify.py out/certified/cifar10-seed0/model.safetensors \
  convnet:width=2 data/cifar10-jpeg linf:2/255 crown 500
"""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from holdfast import data, models
from holdfast.bounds import certify
from holdfast.environment import environment
from holdfast.results import proportion
from holdfast.threat import Threat
from holdfast.train import accuracy, robust_accuracy


def main(weights: str, model: str, source: str, threat: str, method: str, limit: str = "0") -> None:
    split = data.load(source)
    mean, std = data.standardisation(split.train)
    net = models.build(model, split.shape, len(split.classes), mean=mean, std=std)
    net.load_state_dict(load_file(weights))
    test = split.test.take(slice(0, int(limit) or None))
    found = certify(net.eval(), test, threat, method=method)
    line = {
        "model": model, "data": Path(source).name, "threat": threat, "method": method, "n": len(test),
        "clean": accuracy(net, test), "clean_of_all": accuracy(net, split.test),
        "pgd10": robust_accuracy(net, test, Threat.parse(threat)),
        "certified": asdict(proportion(int(found.proved.sum()), len(test))),
        "proved_by": dict(Counter(by for by in found.by if by)),
        "seconds": round(sum(cost.seconds for cost in found.costs), 1), "environment": environment(),
    }  # fmt: skip
    with (Path(__file__).parent / "certified.jsonl").open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
    print(line["n"], line["clean"], line["certified"], line["proved_by"])


if __name__ == "__main__":
    main(*sys.argv[1:])
