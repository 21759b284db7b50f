"""SGLang with this package's kernels: what its entry points sglang.srt.plugins call, in every process of SGLang.

Three plugins, so that SGLANG_PLUGINS can choose among them; without it SGLang loads all that are installed:

    dsv4_kernels_moe      the routed experts of MXFP4 checkpoints, for --moe-runner-backend marlin
    dsv4_kernels_mhc      hyper-connections
    dsv4_kernels_router   routing by sqrt(softplus): top-k, hash tables

A release of SGLang that this was not written for is left as it is, with a warning; where SGLANG_PLUGINS names the
plugin, that is an error, which SGLang logs. register() does all three for a process of one's own.
"""

from __future__ import annotations

import importlib

from dsv4_kernels.integrations.seams import Engine, run_plugin

__all__ = ["ENGINE", "plugin_mhc", "plugin_moe", "plugin_router", "register"]

ENGINE = Engine("sglang", verified=("0.5.23",), below="0.5.24", plugins="SGLANG_PLUGINS")


def register(*, moe: bool = True, mhc: bool = True, router: bool = True) -> None:
    """Puts the kernels into SGLang, for models that are loaded afterwards. Calling it again does nothing.

    Args:
        moe: the routed experts; see the module moe_method.
        mhc: hyper-connections; see the module mhc.
        router: see the module router.

    Raises:
        EngineVersionError: SGLang is not one that this was written for; nothing of that part has been replaced.
        ImportError: SGLang is not installed.
    """
    _add_hooks(moe=moe, mhc=mhc, router=router)
    importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry.apply_hooks()


def _add_hooks(*, moe: bool = False, mhc: bool = False, router: bool = False) -> None:
    """Adds hooks to SGLang's registry, which applies them once all plugins have added theirs."""
    if moe:
        from dsv4_kernels.integrations.sglang import moe_method

        moe_method.register(ENGINE)
    if mhc:
        from dsv4_kernels.integrations.sglang import mhc as mhc_functions

        mhc_functions.register(ENGINE)
    if router:
        from dsv4_kernels.integrations.sglang import router as router_functions

        router_functions.register(ENGINE)


def plugin_moe() -> None:
    """Entry point dsv4_kernels_moe."""
    run_plugin(ENGINE, "dsv4_kernels_moe", lambda: _add_hooks(moe=True))


def plugin_mhc() -> None:
    """Entry point dsv4_kernels_mhc."""
    run_plugin(ENGINE, "dsv4_kernels_mhc", lambda: _add_hooks(mhc=True))


def plugin_router() -> None:
    """Entry point dsv4_kernels_router."""
    run_plugin(ENGINE, "dsv4_kernels_router", lambda: _add_hooks(router=True))
