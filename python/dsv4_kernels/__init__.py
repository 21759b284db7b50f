"""Ahead-of-time compiled kernels for DeepSeek-V4 class models.

    from dsv4_kernels import router
    weights, ids = router.hash_router(token_ids, hash_lut)

Families: `router`, `cache`, `moe`, `stash`, `mhc`. Importing this package imports neither torch nor a compiler and
needs no driver; the first use of a family imports torch and registers its ops as `torch.ops.dsv4.*`.
"""

from __future__ import annotations

import importlib
from typing import Any

from dsv4_kernels import _native
from dsv4_kernels.errors import CudaError, InvalidArgumentError, KernelError, NoDriverError, NoImageError

__all__ = [
    "CudaError",
    "InvalidArgumentError",
    "KernelError",
    "NoDriverError",
    "NoImageError",
    "__version__",
    "info",
    "preload",
]

__version__: str = _native.version()

FAMILIES = ("router", "cache", "moe", "stash", "mhc")


def __getattr__(name: str) -> Any:
    """Imports a family, or Workspace, at its first use."""
    if name in FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "Workspace":
        return importlib.import_module(f"{__name__}.workspace").Workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FAMILIES, "Workspace"})


def _ordinal(function: str, device: int | None) -> int:
    """For the C interface, where -1 is the current device."""
    if device is None:
        return -1
    if type(device) is not int or not 0 <= device < 2**31:
        raise InvalidArgumentError(f"{function}: device: expected the ordinal of a CUDA device or None, got {device!r}")
    return device


def preload(device: int | None = None) -> None:
    """Loads every kernel for a device, so that no later call pays for it.

    Optional: an op loads what it needs at its first call, also while a CUDA graph is being captured.

    Args:
        device: ordinal of a CUDA device; None for the current one.

    Raises:
        NoDriverError: no CUDA driver, none new enough, or no device.
        NoImageError: the package holds no images for this device.
    """
    _native.preload(_ordinal("preload", device))


def info(device: int | None = None) -> dict[str, Any]:
    """What this installation holds and whether it can run here.

    Args:
        device: ordinal of a CUDA device; None for the current one.

    Returns:
        version; images: a list of dicts, one for each kernel and architecture (op, family, name, symbol, language,
        architecture, sha256, bytes, registers, stack, local, static_shared, dynamic_shared, threads, parameters,
        arguments, compilers); device_error: why ops would refuse the device, or None if they run.
    """
    from dsv4_kernels.images import read_images

    return {
        "version": __version__,
        "device_error": _native.device_error(_ordinal("info", device)),
        "images": read_images(),
    }
