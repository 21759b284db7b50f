"""Adding hooks to SGLang's registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from dsv4_kernels.integrations.seams import Engine, Seam, check_engine

_added: set[str] = set()


def add_hooks(engine: Engine, seams: Iterable[Seam], hooks: dict[str, Callable[..., Any]]) -> None:
    """Checks the engine, then adds hook(original, *args, **kwargs) for each target, a dotted name. Once only.

    Raises:
        EngineVersionError: SGLang is not one that this was written for; no hook has been added.
    """
    if _added.issuperset(hooks):
        return
    check_engine(engine, seams)
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    for target, hook in hooks.items():
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
    _added.update(hooks)
