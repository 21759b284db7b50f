"""The router of one layer as a module: holds the gate's tensors and picks the op for each batch."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from dsv4_kernels import _native
from dsv4_kernels.checkpoint import GATE_NAMES, CheckpointError, Source, check_table, check_tensor, load_gate
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.fixed_dtypes import FixedDtypes
from dsv4_kernels.presets import Preset, find_preset
from dsv4_kernels.router.functions import activation_topk, dense_router_decode, hash_router_fused, hash_router_scored
from dsv4_kernels.router.prefill import check_operand, gate_logits
from dsv4_kernels.workspace import Workspace

Mode: TypeAlias = Literal["dense", "hash"]

# What dense_router_decode takes.
_DECODE_TOKENS = 64
_DECODE_EXPERTS = 512
_DECODE_HIDDEN_MULTIPLE = 64

# hash_router_fused reads k rows of the gate per token; the library's product reads every row once, but takes 6 to 7 us
# before the weighing starts, whatever the batch. In that time the L2 cache delivers about so many bytes of rows.
_FUSED_BYTES = _native.hash_router_fused_max_bytes()

# What a checkpoint may hold for each tensor.
_DTYPES = {
    "weight": (torch.bfloat16, torch.float32),
    "bias": (torch.float32,),
    "bias_vl": (torch.float32,),
    "tid2eid": (torch.int64, torch.int32),
}


class Router(FixedDtypes):
    """Which experts each token of a layer goes to, and with which weight, as the DeepSeek-V4 models route.

    A dense layer chooses by its gate's scores; a hash layer looks the experts up by token id and weighs them by those
    scores. The mode is fixed at construction. Parameters carry the models' names and dtypes, so a model's state dict
    loads under the prefix `layers.N.ffn.gate.`: `weight` [experts, hidden_size] bfloat16; in dense layers `bias`
    [experts] float32; in hash layers `tid2eid` [vocab_size, top_k]; with image_bias, `bias_vl` [experts] float32, by
    which a vision model chooses the experts of image tokens. The names of transformers, vLLM and SGLang load too
    (`e_score_correction_bias`). Casting the module moves the tensors but leaves their dtypes alone. For inference: none
    of them takes a gradient.

    Ids are the model's, of all experts, on every rank: expert and tensor parallel callers map them as they need.
    Traces under torch.compile(fullgraph=True) and captures in CUDA graphs. One Router may run on several streams,
    unless it was given a workspace.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        hidden_size: int,
        experts: int,
        top_k: int,
        vocab_size: int | None = None,
        scale: float = 1.0,
        renormalize: bool = True,
        epsilon: float = 0.0,
        int64_ids: bool = False,
        image_bias: bool = False,
        weight_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """A router whose tensors are zero until a state dict is loaded.

        Args:
            mode: 'dense' or 'hash'.
            hidden_size: width of the hidden states.
            experts: routed experts.
            top_k: experts per token.
            vocab_size: token ids; hash mode needs it.
            scale: the model's routed scaling factor.
            renormalize: divide a token's scores by their sum.
            epsilon: added to that sum.
            int64_ids: return ids as int64, for code that indexes torch tensors with them; moe_sort reads either type.
            image_bias: whether there is a `bias_vl`.
            weight_dtype: of the gate: bfloat16, or float32 for a gate that bfloat16 does not hold. The ops of small
                batches multiply bfloat16; with float32, all batches take torch's product of float32 matrices.
            device: where the tensors live.
            workspace: what dense_router_decode computes in: one for the routers of all layers that run one after the
                other, on one stream at a time. None: the library lends one to each stream and to each captured graph,
                so that one Router may run on several streams.
        """
        super().__init__()
        if mode not in ("dense", "hash"):
            raise InvalidArgumentError(f"Router: mode: expected 'dense' or 'hash', got {mode!r}")
        if workspace is not None and type(workspace) is not Workspace:
            got = type(workspace).__name__
            raise InvalidArgumentError(f"Router: workspace: expected a dsv4_kernels.Workspace or None, got {got}")
        if (mode == "hash") != (vocab_size is not None):
            need = "the number of token ids in hash mode" if mode == "hash" else "None in dense mode"
            raise InvalidArgumentError(f"Router: vocab_size: expected {need}, got {vocab_size}")
        if weight_dtype not in _DTYPES["weight"]:
            raise InvalidArgumentError(
                f"Router: weight_dtype: expected torch.bfloat16 or torch.float32, got {weight_dtype}"
            )
        self.mode = mode
        self.weight_dtype = weight_dtype
        self.hidden_size, self.experts, self.top_k, self.vocab_size = hidden_size, experts, top_k, vocab_size
        self.scale, self.renormalize, self.epsilon = float(scale), renormalize, float(epsilon)
        self.int64_ids = int64_ids
        self.workspace = workspace

        def parameter(dtype: torch.dtype, *shape: int) -> Parameter:
            return Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(weight_dtype, experts, hidden_size)
        if vocab_size is None:
            self.bias = parameter(torch.float32, experts)
        else:
            self.tid2eid = parameter(torch.int64, vocab_size, top_k)
        self.bias_vl = parameter(torch.float32, experts) if image_bias else None

    @classmethod
    def from_preset(cls, mode: Mode, preset: str | Preset, **options: Any) -> Router:
        """A router of a public model's sizes; tensors are zero.

        options: scale, renormalize, epsilon, int64_ids, image_bias, weight_dtype, device, workspace.
        """
        sizes = find_preset("Router", preset)
        return cls(
            mode,
            hidden_size=sizes.hidden_size,
            experts=sizes.experts,
            top_k=sizes.top_k,
            vocab_size=sizes.vocab_size if mode == "hash" else None,
            **{"scale": sizes.routed_scaling, **options},
        )

    @classmethod
    def from_checkpoint(cls, path: Source, layer: int | str, preset: str | Preset, **options: Any) -> Router:
        """The router of a layer of a safetensors checkpoint; its mode is what the layer's tensors are for.

        A layer with a table is a hash layer, also where a vision checkpoint keeps a bias beside it; one with a
        `bias_vl` gets image_bias. Without weight_dtype, a gate in float32 stays float32 unless bfloat16 holds all its
        values. dsv4_kernels.checkpoint lists the names that are known.

        Args:
            path: a .safetensors file, a folder with one or with shards and their index, or the tensors by name.
            layer: N, for the gate of `layers.N` or `model.layers.N`; or the name of the block, such as "mtp.0".
            preset: the model, by name or by its sizes.
            options: scale, renormalize, epsilon, int64_ids, weight_dtype, device, workspace.

        Raises:
            CheckpointError: naming file and tensor, what was expected and what there is.
        """
        sizes = find_preset("Router", preset)
        gate = load_gate(path, layer, sizes)
        weight_dtype = torch.bfloat16 if _fits_bfloat16(gate.weight) else torch.float32
        options = {"image_bias": gate.bias_vl is not None, "weight_dtype": weight_dtype, **options}
        router = cls.from_preset("dense" if gate.tid2eid is None else "hash", sizes, **options)
        tensors = {"weight": gate.weight, "bias": gate.bias, "bias_vl": gate.bias_vl, "tid2eid": gate.tid2eid}
        router.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None})
        return router

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        out_weights: Tensor | None = None,
        out_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Routes a batch.

        Args:
            hidden: [tokens, hidden_size] bfloat16; float32 and float16 take more launches.
            token_ids: [tokens] int32 or int64, may be strided. Hash mode needs them, dense mode ignores
                them.
            padding_mask: [tokens] bool, true for padding: ids -1 and weights 0.
            image_mask: [tokens] bool, true for the tokens of an image, whose experts are chosen by `bias_vl`.
            logits: [tokens, experts] float32 or bfloat16, as logits() returns them, for a caller that needs them too:
                hidden is then not read.
            out_weights: [tokens, top_k] float32 to write to.
            out_ids: [tokens, top_k] int32 or int64 to write to.

        Returns:
            weights [tokens, top_k] float32, ids [tokens, top_k] int32, or int64 with int64_ids. The dense mode's and
            those of image tokens are in descending order of score + bias, the hash mode's in the table's order.
        """
        out: dict[str, Any] = {"out_weights": out_weights, "out_ids": out_ids, "int64_ids": self.int64_ids}
        out |= {"renormalize": self.renormalize, "scale": self.scale, "epsilon": self.epsilon}
        by_logits = (
            logits is not None
            or self.weight_dtype != torch.bfloat16
            or hidden.dtype != torch.bfloat16
            or (image_mask is not None and self.mode == "hash")
        )
        if image_mask is not None:
            if self.bias_vl is None:
                raise InvalidArgumentError(
                    "Router: image_mask: expected None without a bias_vl, got a tensor; image_bias=True makes one"
                )
            out |= {"bias_alt": self.bias_vl, "bias_alt_mask": image_mask}
        op = self.op_for(hidden.shape[0], padded=padding_mask is not None, by_logits=by_logits)
        if op == "dense_router_decode":
            return dense_router_decode(hidden, self.weight, self.bias, self.top_k, workspace=self.workspace, **out)
        if self.mode == "hash" and token_ids is None:
            raise InvalidArgumentError("Router: token_ids: expected a tensor in hash mode, got None")
        out["padding_mask"] = padding_mask
        if op == "hash_router_fused":
            return hash_router_fused(token_ids, self.tid2eid, hidden, self.weight, **out)  # type: ignore[arg-type]
        if logits is None:
            logits = self.logits(hidden)
        if self.mode == "dense":
            return activation_topk(logits, self.bias, self.top_k, **out)
        return hash_router_scored(token_ids, self.tid2eid, logits, **out)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """What the experts are scored by, hidden . weight^T: [tokens, experts] float32. As output_router_logits has
        them; forward() takes them, so that they are computed once.
        """
        check_operand("Router", "hidden", hidden, self.hidden_size)
        return gate_logits(hidden, self.weight)

    def op_for(self, tokens: int, padded: bool = False, by_logits: bool = False) -> str:
        """The function that routes a batch of that size: dense_router_decode or dense_router_prefill, hash_router_fused
        or hash_router_scored. padded: whether it comes with a padding mask. by_logits: whether all logits are there, or
        needed in any case.
        """
        if self.mode == "hash":
            read = tokens * self.top_k * self.hidden_size * 2
            fused = not by_logits and read <= _FUSED_BYTES and self.hidden_size % 8 == 0
            return "hash_router_fused" if fused else "hash_router_scored"
        decode = (
            not padded
            and not by_logits
            and tokens <= _DECODE_TOKENS
            and self.experts <= _DECODE_EXPERTS
            and self.hidden_size % _DECODE_HIDDEN_MULTIPLE == 0
        )
        return "dense_router_decode" if decode else "dense_router_prefill"

    def extra_repr(self) -> str:
        """Mode and sizes."""
        return (
            f"mode={self.mode!r}, hidden_size={self.hidden_size}, experts={self.experts}, top_k={self.top_k}, "
            f"scale={self.scale}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        # What is missing is torch's to report: only there is it known whether the caller allows it.
        for name, (_, *others) in GATE_NAMES.items():
            for other in others:
                _rename(state_dict, prefix + other.removeprefix("gate."), prefix + name)
        if self.mode == "hash" and prefix + "tid2eid" in state_dict:
            state_dict.pop(prefix + "bias", None)  # vision checkpoints have it; a table needs none
        for name, dtypes in _DTYPES.items():
            tensor, parameter = state_dict.get(prefix + name), self._parameters.get(name)
            if tensor is None:
                continue
            if parameter is None:
                why = "image_bias=True makes room for it" if name == "bias_vl" else "it is the other mode's"
                raise CheckpointError(
                    f"Router: {prefix}{name}: expected no such tensor in {self.mode} mode, got {list(tensor.shape)}; "
                    f"{why}"
                )
            check_tensor("Router", prefix + name, tensor, tuple(parameter.shape), dtypes)
            if name == "tid2eid":
                check_table("Router", prefix + name, tensor, self.experts)
            if name == "weight" and self.weight_dtype == torch.bfloat16 and not _fits_bfloat16(tensor):
                raise CheckpointError(
                    f"Router: {prefix}{name}: expected values that bfloat16 holds, got float32 ones that it does not; "
                    "weight_dtype=torch.float32 keeps them"
                )
            # With load_state_dict(assign=True) the tensor becomes the parameter.
            state_dict[prefix + name] = tensor.to(parameter.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


def _rename(tensors: dict[str, Any], old: str, new: str) -> None:
    if old in tensors and new not in tensors:
        tensors[new] = tensors.pop(old)


def _fits_bfloat16(tensor: Tensor) -> bool:
    """Whether bfloat16 holds every value. Synchronises if the tensor is not bfloat16 already."""
    if tensor.dtype == torch.bfloat16 or tensor.is_meta:
        return True
    return torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor)
