"""transformers itself: imported when it is needed, and checked to be as this package knows it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from dsv4_kernels.errors import InvalidArgumentError

# The parameters of what is replaced, without self. The cache has been renamed between releases.
_FORWARDS = {
    "DeepseekV4TopKRouter": ("hidden_states",),
    "DeepseekV4HashRouter": ("hidden_states", "input_ids"),
    "DeepseekV4DecoderLayer": ("hidden_states", "input_ids", "kwargs"),
    "DeepseekV4HyperConnection": ("hidden_streams",),
    "DeepseekV4HyperHead": ("x",),
    "DeepseekV4RMSNorm": ("hidden_states",),
    "DeepseekV4UnweightedRMSNorm": ("x",),
}
_VERIFIED = "5.17.0 and 5.24.0"


def modeling() -> Any:
    """transformers' module of DeepSeek-V4.

    Raises:
        InvalidArgumentError: transformers has no such model, or one whose modules are called in another way.
    """
    name = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("transformers.models.deepseek_v4"):
            raise
        raise _unknown(f"no {name}") from error
    for of, parameters in _FORWARDS.items():
        known = getattr(module, of, None)
        found = None if known is None else tuple(inspect.signature(known.forward).parameters)[1:]
        if found != parameters:
            raise _unknown(f"{of}.forward{parameters if found is None else found}, known as {of}.forward{parameters}")
    return module


def _unknown(what: str) -> InvalidArgumentError:
    import transformers

    return InvalidArgumentError(
        f"integrations.transformers: transformers: expected modules of DeepSeek-V4 as in {_VERIFIED}, "
        f"got {what} in {transformers.__version__}"
    )
