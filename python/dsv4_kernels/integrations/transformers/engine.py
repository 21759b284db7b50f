"""transformers itself: imported when it is needed, and checked to be as this package knows it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from dsv4_kernels.errors import InvalidArgumentError

# The parameters of what is replaced, without self. Between these releases `past_key_values` has become `cache`.
_COMPRESSOR = ("hidden_states", "q_residual", "position_ids", "cache", "layer_idx")
_FORWARDS = {
    "DeepseekV4CSACompressor": _COMPRESSOR,
    "DeepseekV4HCACompressor": _COMPRESSOR,
    "DeepseekV4Indexer": _COMPRESSOR,
    "DeepseekV4IndexerScorer": ("q", "compressed_kv", "hidden_states"),
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
        names = [] if known is None else list(inspect.signature(known.forward).parameters)[1:]
        found = tuple("cache" if name == "past_key_values" else name for name in names)
        if found != parameters:
            raise _unknown(f"{of}.forward{found}, known as {of}.forward{parameters}")
    return module


def _unknown(what: str) -> InvalidArgumentError:
    import transformers

    return InvalidArgumentError(
        f"integrations.transformers: transformers: expected modules of DeepSeek-V4 as in {_VERIFIED}, "
        f"got {what} in {transformers.__version__}"
    )
