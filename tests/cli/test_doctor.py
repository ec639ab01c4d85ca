"""holdfast doctor: what is there, what is missing and what is broken, with a command for each."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from holdfast import __version__, doctor
from holdfast.data import DATASETS
from holdfast.data.readers import cache_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_name(findings):
    return {one.name: one for one in findings}


def test_everything_is_looked_at_and_a_good_installation_is_healthy(cache):
    found = by_name(doctor.examine())
    assert found["holdfast"].found == __version__
    assert found["torch"].found == importlib.metadata.version("torch")
    assert {"accelerate", "datasets", "safetensors", "onnx", "cpu", "cache", *DATASETS} <= found.keys()
    assert found["digits"].status == "ok"
    assert found["mnist"].status == "missing"
    assert str(cache) in found["cache"].found
    assert not list(cache.iterdir()), "what was written to try it is gone"
    assert doctor.healthy(doctor.examine())


def test_data_that_was_downloaded_is_here(cache):
    cache.mkdir()
    cache_file(f"hub:{DATASETS['mnist'].repo}").write_bytes(b"")
    found = by_name(doctor.examine())
    assert (found["mnist"].status, found["cifar10"].status) == ("ok", "missing")


def test_a_package_that_is_missing_or_cannot_be_imported_is_broken_with_a_command(monkeypatch, holdfast_):
    real_version = importlib.metadata.version

    def version(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, out, err = holdfast_("doctor", "--quiet")
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "broken  scikit-learn  cannot be imported: ModuleNotFoundError: import of sklearn halted; None in sys.modules; "
        "pip install --force-reinstall 'scikit-learn'",
        "broken  scipy         not installed; pip install 'scipy'",
    ]
    status, out, _ = holdfast_("doctor", "--json")
    assert status == 1
    assert json.loads(out)["healthy"] is False


def test_an_extra_that_is_not_installed_is_named_with_its_command(monkeypatch, holdfast_):
    real = importlib.metadata.version

    def version(name):
        if name in ("onnx", "onnxruntime"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out, _ = holdfast_("doctor")
    assert status == 0, "holdfast works without it"
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "missing onnx not installed: onnx; pip install 'holdfast[onnx]'" in lines
    assert "missing onnxruntime not installed: onnxruntime; pip install onnxruntime" in lines


def test_an_extra_that_is_installed_and_cannot_be_imported_is_not_ok(monkeypatch, holdfast_):
    monkeypatch.setattr(doctor, "_import_error", lambda name: "cannot be imported: why" if name == "onnx" else "")
    status, out, _ = holdfast_("doctor")
    assert status == 0, "holdfast works without it"
    assert "missing onnx installed, but cannot be imported: why" in [
        " ".join(line.split()) for line in out.splitlines()
    ]


def test_a_cache_that_cannot_be_written_is_broken(tmp_path, monkeypatch, holdfast_):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "file" / "cache"))
    status, out, _ = holdfast_("doctor", "-q")
    assert status == 1
    assert out.startswith("broken  cache")
    assert "set HOLDFAST_CACHE" in out


def test_a_gpu_that_does_not_work_is_broken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA driver too old\nx")))
    found = by_name(doctor.examine())["cuda"]
    assert (found.status, found.found) == ("broken", "CUDA driver too old")


def test_it_answers_where_torch_is_broken(tmp_path):
    """In a process of its own: the package that everything imports cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: no such file')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "doctor"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "broken  torch" in done.stdout
    assert "libtorch.so: no such file" in done.stdout
