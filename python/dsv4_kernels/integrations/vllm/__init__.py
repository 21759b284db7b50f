"""vLLM with this package's kernels: what its entry points vllm.general_plugins call, in every process of vLLM.

Three plugins, so that VLLM_PLUGINS can choose among them; without it vLLM loads all that are installed:

    dsv4_kernels_moe      the routed experts of MXFP4 checkpoints
    dsv4_kernels_mhc      hyper-connections
    dsv4_kernels_router   routing by sqrt(softplus): top-k, hash tables

A release of vLLM that this was not written for is left as it is, with a warning; where VLLM_PLUGINS names the plugin,
that is an error. register() does all three for a process of one's own, ahead of vllm.LLM(...).
"""

from __future__ import annotations

from dsv4_kernels.integrations.seams import Engine, run_plugin

__all__ = ["ENGINE", "plugin_mhc", "plugin_moe", "plugin_router", "register"]

ENGINE = Engine("vllm", verified=("0.33.0",), below="0.34", plugins="VLLM_PLUGINS")


def register(*, moe: bool = True, mhc: bool = True, router: bool = True) -> None:
    """Puts the kernels into vLLM, for models that are loaded afterwards. Calling it again does nothing.

    Args:
        moe: the routed experts; see the module experts.
        mhc: hyper-connections; see the module mhc.
        router: see the module router.

    Raises:
        EngineVersionError: vLLM is not one that this was written for; nothing of that part has been replaced.
        ImportError: vLLM is not installed.
    """
    if moe:
        from dsv4_kernels.integrations.vllm import moe_backend

        moe_backend.register(ENGINE)
    if mhc:
        from dsv4_kernels.integrations.vllm import mhc as mhc_functions

        mhc_functions.register(ENGINE)
    if router:
        from dsv4_kernels.integrations.vllm import router as router_functions

        router_functions.register(ENGINE)


def plugin_moe() -> None:
    """Entry point dsv4_kernels_moe."""
    run_plugin(ENGINE, "dsv4_kernels_moe", lambda: register(mhc=False, router=False))


def plugin_mhc() -> None:
    """Entry point dsv4_kernels_mhc."""
    run_plugin(ENGINE, "dsv4_kernels_mhc", lambda: register(moe=False, router=False))


def plugin_router() -> None:
    """Entry point dsv4_kernels_router."""
    run_plugin(ENGINE, "dsv4_kernels_router", lambda: register(moe=False, mhc=False))
