"""DeepSeek-V4 of transformers on this package, beside its own modules in float32 and float64."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.integrations.transformers import PARTS, engine, register, swap_in
from dsv4_kernels.moe import Nvfp4MoE, quantize_mxfp4
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, Fp8Dequantize, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from tests.integrations.toy import in_bfloat16, tokens, toy_config, toy_model

HASHED = {"num_hash_layers": 3}  # no choice that a rounding may turn


def error(given: Tensor, exact: Tensor) -> float:
    """Relative, root mean square."""
    return float((given.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reference() -> Any:
    return toy_model(**HASHED)


class TestWholeModel:
    def test_is_nearer_to_float32_than_transformers_bfloat16(self, reference: Any) -> None:
        ids = tokens(1, 130)
        exact = reference(ids).logits
        ours = swap_in(in_bfloat16(reference))(ids).logits
        theirs = copy.deepcopy(reference).to(torch.bfloat16)(ids).logits
        assert ours.dtype == torch.bfloat16
        assert error(ours, exact) < 0.95 * error(theirs, exact)
        assert error(ours, exact) < 0.03

    def test_a_copy_calls_its_own_modules(self, reference: Any) -> None:
        ids = tokens(1, 8)
        model = swap_in(in_bfloat16(reference))
        wanted = model(ids).logits
        duplicate = copy.deepcopy(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        assert torch.equal(duplicate(ids).logits, wanted)

    def test_only_this_model_changes(self, reference: Any) -> None:
        swap_in(in_bfloat16(reference))
        own = in_bfloat16(reference)
        assert "dsv4_kernels" not in own.model.layers[0].mlp.experts._modules
        assert own.model.layers[0].forward.__func__ is modeling.DeepseekV4DecoderLayer.forward

    def test_router_logits_are_recorded(self, reference: Any) -> None:
        ids = tokens(1, 6)
        model, dense = swap_in(in_bfloat16(toy_model())), toy_model()
        given = model(ids, output_router_logits=True).router_logits
        wanted = dense(ids, output_router_logits=True).router_logits
        assert [one.shape for one in given] == [one.shape for one in wanted]
        assert error(given[0], wanted[0]) < 0.02

    @pytest.mark.parametrize("layer", [0, 2])
    def test_a_block_of_experts_traces_without_a_graph_break(self, reference: Any, layer: int) -> None:
        block = swap_in(in_bfloat16(toy_model())).model.layers[layer].mlp
        hidden = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        ids = tokens(1, 1)
        compiled = torch.compile(lambda x, of: block(x, input_ids=of), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, ids), block(hidden, input_ids=ids))

    def test_parts_alone(self, reference: Any) -> None:
        model = swap_in(in_bfloat16(reference), parts=("hyper_connections",))
        assert "forward" not in vars(model.model.layers[0].mlp.gate)
        assert "dsv4_kernels" not in model.model.layers[0].mlp.experts._modules
        assert "forward" in vars(model.model.layers[0])

    def test_gradients_are_refused(self, reference: Any) -> None:
        model = swap_in(in_bfloat16(reference))
        with torch.enable_grad(), pytest.raises(InvalidArgumentError, match="no_grad"):
            model(tokens(1, 4))


class TestGenerate:
    """generate() against float32: with hash layers and all entries attended no rounding is a choice."""

    OPTIONS: ClassVar[dict[str, Any]] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}

    def test_greedy_tokens_are_those_of_float32(self, reference: Any) -> None:
        prompt = tokens(1, 123)  # the entry of 128 tokens is completed on the way
        model = swap_in(in_bfloat16(reference))
        wanted = reference.generate(prompt, **self.OPTIONS)
        assert torch.equal(model.generate(prompt, **self.OPTIONS), wanted)
        held = model(wanted[:, :-1]).logits[:, -10:].argmax(dim=2)  # and what a prompt of them gives
        assert torch.equal(held, wanted[:, -10:])

    def test_beams_are_reordered(self, reference: Any) -> None:
        """Against the same model without a cache, which has nothing to reorder."""
        prompt = tokens(1, 9, seed=4)
        model = swap_in(in_bfloat16(reference))
        options = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(prompt, use_cache=False, **options)
        assert torch.equal(model.generate(prompt, **options), wanted)

    def test_a_conversation_goes_on(self, reference: Any) -> None:
        text = tokens(2, 40, seed=2)
        model, cache = swap_in(in_bfloat16(reference)), DynamicCache(config=reference.config)
        given = []
        for start, end in ((0, 18), (18, 19), (19, 33), (33, 40)):
            key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            given.append(model(text[:, start:end], use_cache=True, **{key: cache}).logits)
        assert error(torch.cat(given, dim=1), model(text).logits) < 0.01


class TestCompressors:
    """Against transformers' own modules in float64, from the same bfloat16 numbers."""

    def outputs(self, model: Any, layer: int, hidden: Tensor, pieces: list[int]) -> tuple[Tensor, Tensor]:
        """All entries, and what the queries of all pieces see of them."""
        attention = model.model.layers[layer].self_attn
        cache, start, seen = DynamicCache(config=model.config), 0, []
        g = torch.Generator().manual_seed(8)
        residual = torch.randn(hidden.shape[0], hidden.shape[1], 64, generator=g).to(torch.bfloat16)
        for size in pieces:
            part = slice(start, start + size)
            positions = torch.arange(start, start + size).unsqueeze(0)
            start += size
            entries, bias = attention.compressor(
                hidden[:, part], residual[:, part].to(hidden.dtype), positions, cache, layer
            )
            full = torch.full((hidden.shape[0], size, hidden.shape[1]), -torch.inf)
            full[:, :, : entries.shape[2]] = 0.0 if bias is None else bias[:, 0].float()
            seen.append(full)
        return entries[:, 0], torch.cat(seen, dim=1)

    @pytest.mark.parametrize("pieces", [[140], [3, 1, 1, 124, 1, 10]], ids=["at once", "in pieces"])
    @pytest.mark.parametrize("layer", [1, 2])
    def test_entries_and_choices(self, layer: int, pieces: list[int]) -> None:
        model = toy_model(index_topk=8, index_n_heads=16)  # of few heads many scores are 0, and equal
        hidden = torch.randn(2, 140, 128, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
        exact, wanted = self.outputs(copy.deepcopy(model).double(), layer, hidden.double(), pieces)
        entries, seen = self.outputs(swap_in(in_bfloat16(model)), layer, hidden, pieces)
        theirs, seen_there = self.outputs(copy.deepcopy(model).to(torch.bfloat16), layer, hidden, pieces)
        assert error(entries, exact) < 3e-3
        assert error(entries, exact) < 0.4 * error(theirs, exact)
        turned, turned_there = ((one != wanted).sum() for one in (seen, seen_there))  # near ties of the indexer
        assert turned <= 0.7 * turned_there
        assert turned < 0.02 * (wanted == 0).sum()
        assert torch.equal((seen == 0).sum(dim=2), (wanted == 0).sum(dim=2))

    def test_widths_without_kernels_are_refused(self, reference: Any) -> None:
        model = in_bfloat16(reference)
        model.config.compress_rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}
        with pytest.raises(InvalidArgumentError, match=r"compress_rates.*: expected 4, got 8"):
            swap_in(model)

    def test_a_cache_is_reset(self, reference: Any) -> None:
        model, cache = swap_in(in_bfloat16(reference)), DynamicCache(config=reference.config)
        key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        first = model(tokens(1, 20), use_cache=True, **{key: cache}).logits
        cache.layers[1].reset()
        assert cache.layers[1].dsv4 == {}
        assert first.isfinite().all()


class TestRefusals:
    def test_another_model(self) -> None:
        with pytest.raises(InvalidArgumentError, match=r"swap_in: model: expected a DeepSeek-V4 .*, got Linear"):
            swap_in(torch.nn.Linear(2, 2))

    def test_unknown_part(self, reference: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=f"parts: expected some of {', '.join(PARTS)}, got 'attention'"):
            swap_in(reference, parts=("attention",))

    @pytest.mark.parametrize(
        ("option", "value", "need"),
        [("scoring_func", "softmax", "sqrtsoftplus in hash layers"), ("hc_mult", 2, "4")],
    )
    def test_functions_without_kernels(self, reference: Any, option: str, value: object, need: str) -> None:
        model = in_bfloat16(reference)
        setattr(model.config, option, value)
        with pytest.raises(InvalidArgumentError, match=f"config.{option}: expected {need}, got {value!r}"):
            swap_in(model)
        assert "forward" not in vars(model.model.layers[0])  # nothing has changed

    def test_a_release_that_calls_its_modules_in_another_way(
        self, reference: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(modeling.DeepseekV4HyperHead, "forward", lambda self, x, mask: x)
        with pytest.raises(InvalidArgumentError, match=r"DeepseekV4HyperHead.forward\('x', 'mask'\), known as"):
            swap_in(reference)
        monkeypatch.delattr(modeling, "DeepseekV4HyperHead")
        with pytest.raises(InvalidArgumentError, match=r"expected modules .* as in 5\.17\.0"):
            engine.modeling()


class TestRouters:
    """Against transformers' own modules in float64 from the same bfloat16 numbers."""

    @pytest.mark.parametrize("layer", [0, 2])
    def test_equal_float64(self, layer: int) -> None:
        model = toy_model()
        gate = model.model.layers[layer].mlp.gate
        hidden = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        given_ids = tokens(2, 51)[:, 1:]  # a view that is not contiguous
        more = (given_ids,) if layer == 0 else ()
        _, wanted, wanted_ids = copy.deepcopy(gate).double()(hidden.double(), *more)
        own = swap_in(in_bfloat16(model), parts=("routers",)).model.layers[layer].mlp.gate
        _, weights, ids = own(hidden, *more)
        assert ids.dtype == torch.int64
        order, wanted_order = ids.sort(dim=1), wanted_ids.sort(dim=1)
        assert torch.equal(order.values, wanted_order.values)
        assert error(weights.gather(1, order.indices), wanted.gather(1, wanted_order.indices)) < 1e-6


def expert_values(weight: Tensor, scale: Tensor) -> Tensor:
    """By transformers' own code."""
    one = Fp8Dequantize(None)
    return torch.stack([one._dequantize_one(w, s, torch.float32) for w, s in zip(weight, scale, strict=True)])


def exact_experts(gate_up: Tensor, down: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' loop over experts, in float64."""
    config = toy_config()
    config._experts_implementation = "eager"
    module = modeling.DeepseekV4Experts(config).double()
    module.gate_up_proj.copy_(gate_up)
    module.down_proj.copy_(down)
    return module(hidden.double(), ids, weights.double())


def quantized_experts(kind: str, scale_fmt: str) -> FP8Experts:
    """transformers' module for FP4 or FP8 weights, with random ones."""
    config = toy_config()
    config.expert_dtype = kind
    config._experts_implementation = "dsv4_kernels"
    decorated = use_experts_implementation(
        type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    newer = "expert_dtype" in inspect.signature(FP8Experts).parameters
    given = {"expert_dtype": kind} if newer else {}
    module: Any = decorated(config, block_size=(32, 64), scale_fmt=scale_fmt, **given)
    g = torch.Generator().manual_seed(5)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        if kind == "fp4":
            weight.copy_(torch.randint(-128, 128, weight.shape, generator=g, dtype=torch.int8))
        else:  # E2M1 numbers, as DeepSeek's script makes FP8 of FP4
            codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -6])
            picks = torch.randint(0, len(codes), weight.shape, generator=g)
            weight.copy_(codes[picks].to(torch.float8_e4m3fn))
        exponents = torch.randint(-5, -2, scale.shape, generator=g)
        scale.copy_(torch.full(scale.shape, 2.0).pow(exponents).to(scale.dtype))
    return module


class TestExperts:
    """Every kind of expert weights that transformers holds."""

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(9, 128, generator=g).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(9)])
        return hidden, ids, torch.rand(9, 2, generator=g)

    @pytest.mark.parametrize(("kind", "scale_fmt"), [("fp4", "ue8m0"), ("fp4", "float"), ("fp8", "float")])
    def test_quantized(self, kind: str, scale_fmt: str) -> None:
        register()
        module = quantized_experts(kind, scale_fmt)
        gate_up = expert_values(module.gate_up_proj, module.gate_up_proj_scale_inv)
        down = expert_values(module.down_proj, module.down_proj_scale_inv)
        hidden, ids, weights = self.batch()
        wanted = exact_experts(gate_up, down, hidden, ids, weights)
        assert error(module(hidden, ids, weights), wanted) < 4e-3
        assert module.gate_up_proj.numel() == 0  # freed
        assert error(module(hidden, ids, weights), wanted) < 4e-3

    def test_bfloat16_that_was_mxfp4(self, reference: Any) -> None:
        register()
        module = copy.deepcopy(reference.model.layers[0].mlp.experts).to(torch.bfloat16)
        module.config = toy_config()
        module.config._experts_implementation = "dsv4_kernels"
        hidden, ids, weights = self.batch()
        wanted = exact_experts(module.gate_up_proj, module.down_proj, hidden, ids, weights)
        assert error(module(hidden, ids, weights), wanted) < 4e-3

    def test_ids_of_other_ranks_contribute_nothing(self) -> None:
        register()
        module = quantized_experts("fp4", "ue8m0")
        hidden, ids, weights = self.batch()
        alone = module(hidden, ids, weights * (ids < 5))
        assert torch.equal(module(hidden, torch.where(ids < 5, ids, 8), weights), alone)

    def test_values_that_mxfp4_does_not_hold_are_refused(self, reference: Any) -> None:
        model = in_bfloat16(reference)
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = 0.3
        with pytest.raises(
            InvalidArgumentError, match=r"down_proj\[3\]: expected values that MXFP4 holds .*round_weig"
        ):
            swap_in(model)
        swap_in(model, round_weights=True)

    def test_scales_that_are_no_powers_of_two_are_refused(self) -> None:
        register()
        module = quantized_experts("fp4", "float")
        module.gate_up_proj_scale_inv[1, 2, 0] = 0.3
        with pytest.raises(InvalidArgumentError, match="gate_up_proj_scale_inv: expected powers of two"):
            module(*self.batch())

    def test_another_activation_is_refused(self, reference: Any) -> None:
        model = in_bfloat16(reference)
        model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
        with pytest.raises(InvalidArgumentError, match=r"experts: expected SwiGLU, clamped at 10\.0"):
            swap_in(model)

    def test_from_pretrained(self, reference: Any, tmp_path: Path) -> None:
        """As a user has it: saved, and loaded with the implementation named."""
        ids = tokens(1, 6)
        reference.save_pretrained(tmp_path)
        register()
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, experts_implementation="dsv4_kernels"
        ).to(torch.bfloat16)
        logits = model(ids).logits
        assert type(model.model.layers[0].mlp.experts.dsv4_kernels) is Nvfp4MoE
        assert error(logits, reference(ids).logits) < 0.05


class TestWeights:
    def test_freed_weights_cannot_be_saved(self, reference: Any) -> None:
        model = swap_in(in_bfloat16(reference))
        with pytest.raises(
            InvalidArgumentError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: expected weights to save"
        ):
            model.state_dict()

    def test_kept_weights_can_and_loaded_ones_are_prepared_in_place(self, reference: Any) -> None:
        own, other = in_bfloat16(reference), in_bfloat16(toy_model(seed=1, **HASHED))
        model = swap_in(copy.deepcopy(own), keep_weights=True)
        state = model.state_dict()
        assert state.keys() == own.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in own.state_dict().items())
        prepared = model.model.layers[1].mlp.experts.dsv4_kernels
        before = [tensor.data_ptr() for tensor in prepared.buffers()]
        model.load_state_dict(other.state_dict())
        assert [tensor.data_ptr() for tensor in prepared.buffers()] == before
        ids = tokens(1, 6)
        assert torch.equal(model(ids).logits, swap_in(other)(ids).logits)

    def test_a_checkpoint_replaces_weights_in_place(self, reference: Any) -> None:
        model = swap_in(in_bfloat16(reference))
        ids = tokens(1, 6)
        before = [t.data_ptr() for t in model.model.layers[2].mlp.experts.dsv4_kernels.buffers()]
        other = toy_model(seed=1, **HASHED)
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(other.model.layers):
            experts = layer.mlp.experts
            for expert in range(8):
                gate, up = experts.gate_up_proj[expert].chunk(2)
                for name, matrix in (("w1", gate), ("w3", up), ("w2", experts.down_proj[expert])):
                    codes, scale = quantize_mxfp4(matrix.contiguous())
                    prefix = f"layers.{number}.ffn.experts.{expert}.{name}"
                    tensors |= {f"{prefix}.weight": codes.view(torch.int8), f"{prefix}.scale": scale}
        swap_in(model, tensors)
        assert [t.data_ptr() for t in model.model.layers[2].mlp.experts.dsv4_kernels.buffers()] == before
        mixed = copy.deepcopy(reference)
        for layer, source in zip(mixed.model.layers, other.model.layers, strict=True):
            layer.mlp.experts.load_state_dict(source.mlp.experts.state_dict())
        assert error(model(ids).logits, mixed(ids).logits) < 0.03


def test_the_engine_has_both_registries() -> None:
    register()
    assert "dsv4_kernels" in finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
