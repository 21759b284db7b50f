"""A back end of vLLM's MXFP4 oracle, beside Marlin, DeepGEMM and the others.

vLLM has no registry for back ends from outside, so its enumeration gets a member, which the five functions
of the oracle that take or return one know too. "auto" takes it where vLLM would take Marlin, its first
choice on Hopper; what vLLM prefers on Blackwell stays preferred there. Choosing another by --moe-backend works as ever.
"""

from __future__ import annotations

from typing import Any

from dsv4_kernels.integrations.seams import Engine, Seam, check_engine, wrap_everywhere

BACKEND = "DSV4_KERNELS"

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.mxfp4"
_KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"
_METHOD = "vllm.model_executor.layers.quantization.mxfp4"
SEAMS = (
    # Replaced.
    Seam(_ORACLE, "backend_to_kernel_cls", "9ef334cd22166ec3"),
    Seam(_ORACLE, "map_mxfp4_backend", "be1b73f4b4b3beac"),
    Seam(_ORACLE, "_get_priority_backends", "781abaf84282df39"),
    Seam(_ORACLE, "convert_weight_to_mxfp4_moe_kernel_format", "e129c3429d5b0151"),
    Seam(_ORACLE, "make_mxfp4_moe_quant_config", "83dafcce9dd04065"),
    # Relied on: who calls those, what the experts are given, and who calls them.
    Seam(_ORACLE, "Mxfp4MoeBackend", "f928743f753e89a1"),
    Seam(_ORACLE, "select_deepseek_v4_mxfp4_moe_backend", "b416bf31bbb395aa"),
    Seam(_ORACLE, "mxfp4_round_up_hidden_size_and_intermediate_size", "9dda30f529aa9cc8"),
    Seam(_ORACLE, "make_mxfp4_moe_kernel", "c9f35664f8b34bb8"),
    Seam(_METHOD, "Mxfp4MoEMethod.create_weights", "5538a4fdc27207a4"),
    Seam(_METHOD, "Mxfp4MoEMethod._setup_kernel", "541ed22e7b506186"),
    Seam(_METHOD, "Mxfp4MoEMethod._build_moe_kernel", "0a540a9b68cc66ce"),
    Seam(_METHOD, "Mxfp4MoEMethod.apply", "084e3ceb86d66813"),
    Seam(_KERNEL, "FusedMoEExperts", "2e6c3acb63628ec9"),
    Seam(_KERNEL, "FusedMoEExpertsModular", "8e8bfce985b63389"),
    Seam(_KERNEL, "FusedMoEKernelModularImpl", "2f7a8878901da37b"),
    Seam("vllm.model_executor.layers.fused_moe.activation", "apply_moe_activation", "de45b11e53106437"),
    Seam("vllm.model_executor.layers.fused_moe.config", "mxfp4_w4a16_moe_quant_config", "02c22072ff297b94"),
)


def register(engine: Engine) -> None:
    """Adds the back end to the oracle. Raises EngineVersionError for a vLLM that this was not written for."""
    import importlib

    oracle = importlib.import_module(_ORACLE)
    backends = oracle.Mxfp4MoeBackend
    if BACKEND in backends.__members__:
        return
    check_engine(engine, SEAMS)
    from dsv4_kernels.integrations.vllm.experts import Dsv4Experts

    ours = _add_member(backends, BACKEND)

    def kernel_classes(original: Any, backend: Any) -> Any:
        return [Dsv4Experts] if backend is ours else original(backend)

    def backends_of(original: Any, runner_backend: str) -> Any:
        return [ours] if runner_backend == "dsv4_kernels" else original(runner_backend)

    def priorities(original: Any) -> Any:
        found = list(original())
        if backends.MARLIN in found:
            place = min(found.index(b) for b in (backends.MARLIN, backends.HUMMING) if b in found)
            found.insert(place, ours)
        return found

    def convert(original: Any, mxfp4_backend: Any, layer: Any, *tensors: Any, **options: Any) -> Any:
        if mxfp4_backend is not ours:
            return original(mxfp4_backend, layer, *tensors, **options)
        # The checkpoints' layout, which Dsv4Experts.process_weights_after_loading rearranges.
        names = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias")
        given = dict(zip(names, tensors, strict=False)) | options
        return tuple(None if (tensor := given.get(name)) is None else tensor.data for name in names)

    def quant_config(original: Any, mxfp4_backend: Any, *scales: Any, **options: Any) -> Any:
        return original(backends.MARLIN if mxfp4_backend is ours else mxfp4_backend, *scales, **options)

    for name, hook in (
        ("backend_to_kernel_cls", kernel_classes),
        ("map_mxfp4_backend", backends_of),
        ("_get_priority_backends", priorities),
        ("convert_weight_to_mxfp4_moe_kernel_format", convert),
        ("make_mxfp4_moe_quant_config", quant_config),
    ):
        wrap_everywhere(oracle, name, hook)


def _add_member(enumeration: Any, name: str) -> Any:
    """A member of an Enum that is defined already; its value is its name."""
    member = object.__new__(enumeration)
    member._name_, member._value_, member.__objclass__ = name, name, enumeration
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    type.__setattr__(enumeration, name, member)
    return member
