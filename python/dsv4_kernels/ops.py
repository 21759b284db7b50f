"""Every op of the package, by name, in the order of the families and of their declarations."""

from __future__ import annotations

import importlib

from dsv4_kernels import FAMILIES
from dsv4_kernels.op import OPS as _DECLARED
from dsv4_kernels.op import Op

for _family in FAMILIES:
    importlib.import_module(f"dsv4_kernels.{_family}")

OPS: dict[str, Op] = {name: op for family in FAMILIES for name, op in list(_DECLARED.items()) if op.family == family}
