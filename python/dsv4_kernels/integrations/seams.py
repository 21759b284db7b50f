"""Where an engine is changed, and the check that it is the engine this was written for.

An engine's functions are replaced by name, which is right only while they do what they did when the replacement was
written. So each function, method or class that a plugin replaces or relies on is recorded with the SHA-256 of its
source, and each plugin with the releases that it was tested against. Where either differs nothing is replaced.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dsv4_kernels.errors import KernelError

_DIGITS = 16  # of a digest: 64 bits are plenty against an accident


class EngineVersionError(KernelError, ImportError):
    """The engine is not one that this package was tested with: the text names its version, those, and the way out."""


class Seam(NamedTuple):
    """A function, method or class of an engine.

    module and name: where it is, such as "vllm.config" and "VllmConfig.compute_hash". digest: source_digest() of it.
    """

    module: str
    name: str
    digest: str

    def resolve(self) -> Any:
        """The object itself; imports its module."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
        return found


class Engine(NamedTuple):
    """An engine's releases that a plugin was tested with.

    distribution: its name for pip. verified: those releases. below: the first release that may differ: one from the
    oldest verified on and below it is taken, if its seams are the verified ones. plugins: the environment variable by
    which the engine chooses plugins.
    """

    distribution: str
    verified: tuple[str, ...]
    below: str
    plugins: str

    def version(self) -> str:
        """What is installed."""
        return importlib.metadata.version(self.distribution)

    def way_out(self) -> str:
        """What a user can do about an engine of another version."""
        return (
            f"install {self.distribution} {self.verified[-1]}, or a dsv4-kernels that knows this version, or list the "
            f"plugins to load without dsv4_kernels in {self.plugins}; the engine is left as it is"
        )


def source_digest(found: Any) -> str:
    """The first digits of the SHA-256 of an object's source text, without its common indentation."""
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    return hashlib.sha256(inspect.cleandoc(inspect.getsource(inspect.unwrap(found))).encode()).hexdigest()[:_DIGITS]


def check_engine(engine: Engine, seams: Iterable[Seam]) -> None:
    """Raises EngineVersionError unless the installed engine is one that the plugin was written for."""
    version = engine.version()
    verified = ", ".join(engine.verified)
    if not _release(engine.verified[0]) <= _release(version) < _release(engine.below):
        raise EngineVersionError(
            f"dsv4_kernels: {engine.distribution}: expected a version this package was tested with ({verified}), got "
            f"{version}; {engine.way_out()}"
        )
    for seam in seams:
        try:
            digest = source_digest(seam.resolve())
        except (AttributeError, OSError) as error:
            digest = f"none ({error})"
        if digest != seam.digest:
            raise EngineVersionError(
                f"dsv4_kernels: {engine.distribution} {version}: {seam.module}.{seam.name}: expected the source that "
                f"this package was tested with ({verified}; digest {seam.digest}), got {digest}; {engine.way_out()}"
            )


def replace_everywhere(module: types.ModuleType, name: str, value: Any) -> None:
    """Gives a module's attribute another value, there and wherever `from module import name` has copied it to."""
    original = getattr(module, name)
    setattr(module, name, value)
    package = module.__name__.partition(".")[0]
    for other_name, other in list(sys.modules.items()):
        if not isinstance(other, types.ModuleType) or other_name.partition(".")[0] != package:
            continue
        for attribute, found in list(vars(other).items()):
            if found is original and other is not module:
                setattr(other, attribute, value)


def wrap_everywhere(module: types.ModuleType, name: str, hook: Callable[..., Any]) -> None:
    """replace_everywhere with a function that calls hook(original, *args, **kwargs); its signature stays."""
    original = getattr(module, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    replace_everywhere(module, name, wrapper)


def run_plugin(engine: Engine, name: str, register: Callable[[], None]) -> None:
    """Runs a plugin that an engine found by its entry point.

    An engine loads every plugin that is installed. One that does not fit the engine must not keep the engine from
    starting, unless its user asked for the plugin by name: then it is an error.
    """
    try:
        register()
    except EngineVersionError as error:
        chosen = os.environ.get(engine.plugins, "")
        if name in (part.strip() for part in chosen.split(",")):
            raise
        logging.getLogger(engine.distribution).warning("%s", error)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
