"""The bill of materials that travels in the wheel (PEP 770): what the binaries in it were made by, and of.

    python -m aot.sbom IMAGES_JSON VERSION OUT        writes CycloneDX 1.6

Holds no time and no random number: the same wheel has the same bill.
"""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from aot.sources import build_requirements

# Build requirements whose code is part of the binaries; the others only make or read them.
LINKED = {"nvidia-cuda-runtime": "static libcudart", "pybind11": "headers", "nvidia-cuda-cccl": "headers"}


def component_of(requirement: Requirement) -> dict[str, Any]:
    """A build requirement as a component; with its version if that is pinned, as the compilers' are."""
    (pin,) = requirement.specifier or (None,)
    exact = {"version": pin.version} if pin and pin.operator == "==" and "*" not in pin.version else {}
    reference = "@".join((f"pkg:pypi/{requirement.name}", *exact.values()))
    linked = LINKED.get(requirement.name)
    return {
        "type": "library" if linked else "application",
        "bom-ref": reference,
        "name": requirement.name,
        **exact,
        "scope": "required" if linked else "excluded",
        "purl": reference,
        "description": f"linked into the binaries ({linked})" if linked else "used by the build, not part of the wheel",
    }


def component_of_image(image: dict[str, Any]) -> dict[str, Any]:
    """A kernel image as a component."""
    return {
        "type": "file",
        "bom-ref": f"{image['architecture']}/{image['symbol']}",
        "name": image["symbol"],
        "hashes": [{"alg": "SHA-256", "content": image["sha256"]}],
        "properties": [
            {"name": f"dsv4:{key}", "value": str(image[key])} for key in ("op", "family", "language", "architecture")
        ]
        + [{"name": f"dsv4:compiler:{name}", "value": version} for name, version in image["compilers"].items()],
    }


def bill(images: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """The whole document."""
    reference = f"pkg:pypi/dsv4-kernels@{version}"
    components = [component_of(requirement) for requirement in build_requirements()]
    components += [component_of_image(image) for image in images]
    content = json.dumps([reference, components], sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": reference,
                "name": "dsv4-kernels",
                "version": version,
                "purl": reference,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
    }


def main() -> None:
    images, version, out = sys.argv[1:]
    Path(out).write_text(json.dumps(bill(json.loads(Path(images).read_text()), version), indent=1) + "\n")


if __name__ == "__main__":
    main()
