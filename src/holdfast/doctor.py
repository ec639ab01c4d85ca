"""What is installed, which device there is, and what to do about what is missing; no package is imported before."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import tempfile
from dataclasses import dataclass

OPTIONAL = ("onnxruntime",)  # that no extra for users names: it confirms adversarial examples and exports
DEVELOPMENT = ("docs", "test", "bench")  # extras for work on holdfast itself
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyautoattack": "pyautoattack"}  # where the names differ


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Args:
        group: "versions", "packages", "device", "optional", "data" or "cache".
        name: of what was looked at.
        found: what it is, in words.
        status: "ok", "missing" (something that holdfast works without) or "broken" (it does not).
        advice: what to do, "" for nothing.
    """

    group: str
    name: str
    found: str
    status: str = "ok"
    advice: str = ""


def examine() -> tuple[Finding, ...]:
    """Look at everything; nothing raises, and nothing is changed but for a file in the cache that is removed again."""
    packages = [_package(name) for name in requirements("")]
    broken = any(one.status == "broken" for one in packages)
    more = () if broken else (*_device(), *_data())
    return (*_versions(), *packages, *more, *_optional(), _cache())


def healthy(findings: tuple[Finding, ...]) -> bool:
    """Whether nothing is broken.

    >>> healthy((Finding("packages", "torch", "2.6"), Finding("optional", "onnx", "not installed", "missing")))
    True
    """
    return all(one.status != "broken" for one in findings)


def requirements(extra: str) -> tuple[str, ...]:
    """The packages that holdfast's own metadata asks for, by name: with "" those it needs, else those of an extra."""
    try:
        listed = importlib.metadata.requires("holdfast") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return ()
    names = []
    for line in listed:
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if name and name[0] != "holdfast" and (named[1] if named else "") == extra:
            names.append(name[0])
    return tuple(names)


def _versions() -> tuple[Finding, ...]:
    from . import __version__

    return (
        Finding("versions", "holdfast", __version__),
        Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}"),
    )


def _package(name: str) -> Finding:
    """A package that holdfast needs: its version, if it can be imported."""
    advice = f"pip install --force-reinstall '{name}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", name, "not installed", "broken", f"pip install '{name}'")
    reason = _import_error(name)
    return Finding("packages", name, version) if not reason else Finding("packages", name, reason, "broken", advice)


def _import_error(name: str) -> str:
    """Why a package cannot be imported, in one line; "" where it can."""
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken installation fails in any way
        line = (str(error).splitlines() or [""])[0]
        return f"cannot be imported: {type(error).__name__}: {line}"[:200]
    return ""


def _device() -> tuple[Finding, ...]:
    """The device that ``--device auto`` takes, and the cores of the processor."""
    import torch

    from .environment import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = Finding("device", "cpu", f"{cores} cores for this process, {torch.get_num_threads()} threads: {processor()}")
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda").cpu()
        except Exception as error:  # a driver that does not fit
            line = (str(error).splitlines() or [""])[0]
            return (cpu, Finding("device", "cuda", line[:200], "broken", "use --device cpu, or mend driver or torch"))
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        what = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
        return (cpu, Finding("device", "cuda", f"{what}; --device auto takes it"))
    if torch.backends.mps.is_available():
        return (cpu, Finding("device", "mps", "there is one; --device mps takes it, auto takes the cpu"))
    return (cpu, Finding("device", "gpu", "none that this torch can use; --device auto takes the cpu"))


def _data() -> tuple[Finding, ...]:
    """The data sets that have a name, and whether they need a network."""
    from .data import DATASETS

    return tuple(
        Finding("data", name, "here")
        if entry.is_here
        else Finding("data", name, f"fetched from the hub ({entry.repo}) when it is first used", "missing")
        for name, entry in DATASETS.items()
    )


def _optional() -> tuple[Finding, ...]:
    """The extras, and packages that are used where they are installed."""
    findings = []
    try:
        extras = importlib.metadata.metadata("holdfast").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        extras = []
    wanted = [(name, requirements(name), f"pip install 'holdfast[{name}]'") for name in sorted(extras)]
    wanted += [(name, (name,), f"pip install {name}") for name in OPTIONAL]
    for name, packages, advice in wanted:
        lacking = [package for package in packages if not _is_installed(package)]
        purpose = " (for work on holdfast)" if name in DEVELOPMENT else ""
        if lacking:
            found = f"not installed: {', '.join(lacking)}{purpose}"
            findings.append(Finding("optional", name, found, "missing", advice))
        else:
            reason = "" if purpose else next(filter(None, map(_import_error, packages)), "")
            found = f"installed, but {reason}" if reason else f"installed{purpose}"
            findings.append(Finding("optional", name, found, "missing" if reason else "ok"))
    return tuple(findings)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> Finding:
    """Whether decoded data can be kept."""
    try:
        from .data.readers import cache_folder
    except Exception:  # a package that is broken has a line of its own
        return Finding("cache", "cache", "not looked at, since a package is broken", "missing")
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
        return Finding("cache", "cache", found, "broken", "set HOLDFAST_CACHE to a folder that can be written")
    return Finding("cache", "cache", f"{folder} can be written")
