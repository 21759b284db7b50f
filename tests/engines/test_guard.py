"""What happens with an engine of another release, or one that has been changed: nothing, and a text that says so."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import types
from typing import Any

import pytest
from dsv4_kernels.integrations import seams
from dsv4_kernels.integrations.seams import Engine, EngineVersionError, Seam, check_engine

MODULES = {
    "vllm": ("moe_backend", "mhc", "router"),
    "sglang": ("moe_method", "mhc", "router"),
}


def modules() -> list[tuple[str, str]]:
    return [
        (engine, f"dsv4_kernels.integrations.{engine}.{name}") for engine, names in MODULES.items() for name in names
    ]


def engine_of(name: str) -> Engine:
    return importlib.import_module(f"dsv4_kernels.integrations.{name}").ENGINE


def set_version(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version if n == name else original(n))


@pytest.mark.parametrize(("engine", "module"), modules())
def test_the_engine_of_the_wheel_is_the_one_that_was_verified(engine: str, module: str) -> None:
    found = engine_of(engine)
    assert found.version() == found.verified[-1]
    check_engine(found, importlib.import_module(module).SEAMS)


@pytest.mark.parametrize("engine", MODULES)
@pytest.mark.parametrize(("of_vllm", "of_sglang"), [("0.32.0", "0.5.22"), ("0.34.0", "0.5.24"), ("1.0.0rc1", "dev")])
def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, engine: str, of_vllm: str, of_sglang: str) -> None:
    found, version = engine_of(engine), {"vllm": of_vllm, "sglang": of_sglang}[engine]
    set_version(monkeypatch, engine, version)
    with pytest.raises(EngineVersionError) as refused:
        check_engine(found, [])
    text = str(refused.value)
    assert f"dsv4_kernels: {engine}: expected a version this package was tested with ({found.verified[0]})" in text
    assert f"got {version};" in text
    assert f"install {engine} {found.verified[0]}" in text
    assert found.plugins in text


@pytest.mark.parametrize(("engine", "module"), modules())
def test_a_changed_function_is_refused(engine: str, module: str) -> None:
    """One whose source is another, and one that is not there."""
    recorded = importlib.import_module(module).SEAMS
    for changed in (recorded[0]._replace(digest="0" * 16), Seam(recorded[0].module, "no_such_function", "0" * 16)):
        with pytest.raises(EngineVersionError) as refused:
            check_engine(engine_of(engine), [*recorded[1:], changed])
        text = str(refused.value)
        assert f"{changed.module}.{changed.name}: expected the source that this package was tested with" in text
        assert "the engine is left as it is" in text
        assert engine_of(engine).verified[0] in text


def test_a_patch_release_with_the_same_sources_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, "vllm", "0.33.1.post2+cu130")
    check_engine(engine_of("vllm"), importlib.import_module("dsv4_kernels.integrations.vllm.mhc").SEAMS)


def test_nothing_is_replaced_in_an_engine_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("dsv4_kernels.integrations.vllm.mhc")
    monkeypatch.setattr(module, "_registered", False)
    set_version(monkeypatch, "vllm", "0.35.0")
    functions = importlib.import_module("vllm.model_executor.kernels.mhc.tilelang")
    before = dict(vars(functions))
    with pytest.raises(EngineVersionError):
        module.register(engine_of("vllm"))
    assert dict(vars(functions)) == before
    assert not module._registered


def refuse() -> None:
    raise EngineVersionError("dsv4_kernels: vllm: expected 1, got 2")


@pytest.mark.parametrize("chosen", [None, "another_plugin"])
def test_a_plugin_that_nobody_asked_for_leaves_the_engine_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        seams.run_plugin(engine_of("vllm"), "dsv4_kernels_mhc", refuse)
    assert [record.getMessage() for record in caplog.records] == ["dsv4_kernels: vllm: expected 1, got 2"]


def test_a_plugin_that_was_asked_for_by_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another, dsv4_kernels_mhc")
    with pytest.raises(EngineVersionError):
        seams.run_plugin(engine_of("vllm"), "dsv4_kernels_mhc", refuse)


def test_vllm_finds_the_plugins_by_their_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv4_kernels.integrations.vllm as plugin
    import vllm.plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    found = vllm.plugins.load_plugins_by_group("vllm.general_plugins")
    ours = {name: function for name, function in found.items() if name.startswith("dsv4_kernels")}
    assert ours == {f"dsv4_kernels_{part}": getattr(plugin, f"plugin_{part}") for part in ("moe", "mhc", "router")}


def test_sglang_finds_the_plugins_by_their_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv4_kernels.integrations.sglang as plugin
    import sglang.srt.plugins

    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    found = sglang.srt.plugins.load_plugins_by_group("sglang.srt.plugins")
    ours = {name: function for name, (function, _) in found.items() if name.startswith("dsv4_kernels")}
    assert ours == {f"dsv4_kernels_{part}": getattr(plugin, f"plugin_{part}") for part in ("moe", "mhc", "router")}


def test_replacing_reaches_modules_that_have_imported_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    one, two, stranger = (types.ModuleType(name) for name in ("someengine.one", "someengine.two", "another"))

    def function(x: int, *, y: int = 2) -> int:
        return x + y

    for module in (one, two, stranger):
        module.function = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def hook(original: Any, *args: Any, **kwargs: Any) -> int:
        return 10 * original(*args, **kwargs)

    seams.wrap_everywhere(one, "function", hook)
    assert one.function(1, y=1) == two.function(1, y=1) == 20
    assert stranger.function(1, y=1) == 2
    assert seams.source_digest(one.function) == seams.source_digest(function)
