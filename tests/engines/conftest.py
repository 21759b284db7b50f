"""Tests of the plugins against the engines' own modules, from their wheels: ci/engines.sh makes the environment."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from tests.engines import cpu  # noqa: F401

NEEDED = {"vllm": "0.33.0", "sglang": "0.5.23"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # An engine that is not there is an error, not a reason to skip: these tests are nothing without it.
    for name, version in NEEDED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            pytest.exit(f"tests/engines needs {name} {version}, got {found}; run ci/engines.sh", returncode=4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
