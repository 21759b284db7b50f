"""What a result was measured on: recorded beside every figure."""

from __future__ import annotations

import platform
from typing import Any

import torch

from dsv4_kernels import __version__, _native


def default_device() -> str:
    """The current CUDA device if the package can run there, else "cpu"."""
    if torch.cuda.is_available() and _native.device_error(-1) is None:
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu"


def describe(device: str) -> dict[str, Any]:
    """Device, driver and versions, as recorded with results."""
    facts: dict[str, Any] = {
        "package": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str | None:
    """As NVML reports it, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no NVML: the figure is recorded without it
        return None


def image_for(op: str, device: str) -> str:
    """What an op runs on that device: the language and architecture of its images, or torch on the CPU."""
    if device == "cpu":
        return "torch (cpu)"
    from dsv4_kernels.images import read_images

    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}a"
    languages = {i["language"] for i in read_images() if i["op"] == op and i["architecture"] == architecture}
    return f"{'+'.join(sorted(languages))} {architecture}"
