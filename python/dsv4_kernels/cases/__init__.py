"""Cases of every op, and the baselines and definitions that their results are compared with.

One declaration serves the tests, the selftest and the benchmark. dsv4_kernels/cases/<family>/ holds a module for each
module of the family, with its CASES; definitions.py there is what results are checked against. Nothing here imports
dsv4_kernels.cpu: a definition that shared code with the CPU backend could not find it wrong.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from dsv4_kernels.cases.case import Baseline, Case, Composite, Verdict, named
from dsv4_kernels.cases.comparison import (
    FLOAT32_ULP,
    POISON_BYTE,
    fresh,
    is_poison,
    poison,
    same_bits,
    to_cpu,
    worst_relative_error,
)
from dsv4_kernels.ops import OPS

__all__ = [
    "FLOAT32_ULP",
    "POISON_BYTE",
    "Baseline",
    "Case",
    "Composite",
    "Verdict",
    "all_cases",
    "composites",
    "fresh",
    "is_poison",
    "named",
    "poison",
    "same_bits",
    "to_cpu",
    "worst_relative_error",
]


def _modules() -> list[ModuleType]:
    """The modules of cases of every family that has ops."""
    families = dict.fromkeys(op.family for op in OPS.values())
    packages = [importlib.import_module(f"{__name__}.{family}") for family in families]
    return [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for package in packages
        for module in pkgutil.iter_modules(package.__path__)
    ]


def all_cases() -> list[Case]:
    """The cases of every op, in the order in which the ops are declared."""
    cases: list[Case] = [case for module in _modules() for case in getattr(module, "CASES", ())]
    order = list(OPS)
    return sorted(cases, key=lambda case: order.index(case.op))


def composites() -> list[Composite]:
    """The public functions made of several ops that the benchmark times."""
    return [composite for module in _modules() for composite in getattr(module, "COMPOSITES", ())]
