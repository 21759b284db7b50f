"""The sidecars of the images in the library, as the build recorded them."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def read_images() -> list[dict[str, Any]]:
    """One dict for each kernel and architecture, ordered by family, op, kernel and architecture."""
    images: list[dict[str, Any]] = json.loads((files("dsv4_kernels") / "images.json").read_text())
    return images
