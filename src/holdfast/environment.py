"""Where a number was measured: versions and hardware, as env.json and results.json hold them."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__


def environment() -> dict[str, Any]:
    """Versions of holdfast, Python and torch, the platform, the processor, torch's threads and the GPU (or None).

    >>> sorted(environment())
    ['gpu', 'holdfast', 'platform', 'processor', 'python', 'threads', 'torch']
    """
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's model name; its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
