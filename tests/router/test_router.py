from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cases.router.functions import gate_inputs
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.presets import PRESETS, Preset
from dsv4_kernels.router import Router
from safetensors.torch import save_file

from tests.router import oracle

# The models' shapes, reduced so that one number at a time is quick.
REDUCED = {
    name: replace(p, hidden_size=p.hidden_size // 16, experts=p.experts // 8, vocab_size=500)
    for name, p in PRESETS.items()
}
FLASH = REDUCED["v4-flash"]
MODES = ("dense", "hash")


def gate_tensors(mode: str, preset: Preset = FLASH, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a checkpoint holds for a gate, without the prefix."""
    generator = torch.Generator().manual_seed(seed)
    _, weight, bias = gate_inputs(generator, 1, preset.hidden_size, preset.experts)
    assert bias is not None
    if mode == "dense":
        return {"weight": weight, "bias": bias}
    return {
        "weight": weight,
        "tid2eid": torch.randint(preset.experts, (preset.vocab_size, preset.top_k), generator=generator),
    }


def loaded(mode: str, device: str = "cpu", preset: Preset = FLASH, seed: int = 0) -> Router:
    router = Router.from_preset(mode, preset, device=device)  # type: ignore[arg-type]
    router.load_state_dict(gate_tensors(mode, preset, seed))
    return router


def batch(tokens: int, device: str = "cpu", preset: Preset = FLASH, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, _, _ = gate_inputs(generator, tokens, preset.hidden_size, 1)
    return hidden.to(device), torch.randint(preset.vocab_size, (tokens,), generator=generator).to(device)


def expected(router: Router, hidden: torch.Tensor, token: int) -> tuple[list[float], list[int]]:
    """One token by the mathematics."""
    gate = {name: tensor.tolist() for name, tensor in router.state_dict().items()}
    row = hidden.tolist()
    if router.mode == "dense":
        return oracle.dense(row, gate["weight"], gate["bias"], router.top_k, scale=router.scale)
    logits = [sum(h * w for h, w in zip(row, expert, strict=True)) for expert in gate["weight"]]
    return oracle.hash_router_scored(token, gate["tid2eid"], logits, scale=router.scale)


@pytest.mark.parametrize("tokens", [1, 64, 65, 2500])
@pytest.mark.parametrize("preset", REDUCED.values(), ids=lambda preset: preset.name)
@pytest.mark.parametrize("mode", MODES)
def test_mathematics(mode: str, preset: Preset, tokens: int, device: str) -> None:
    router = loaded(mode, device, preset)
    hidden, token_ids = batch(tokens, device, preset)
    weights, ids = router(hidden, token_ids)
    assert weights.shape == ids.shape == (tokens, preset.top_k)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((tokens,), preset.routed_scaling, device=device))
    for i in {0, tokens // 2, tokens - 1}:
        want_weights, want_ids = expected(router, hidden[i], int(token_ids[i]))
        assert ids[i].tolist() == want_ids
        assert weights[i].tolist() == pytest.approx(want_weights, rel=3e-6)


def test_each_batch_takes_its_op() -> None:
    dense, table = (
        Router.from_preset("dense", "v4-flash", device="meta"),
        Router.from_preset("hash", "v4-flash", device="meta"),
    )
    assert [dense.op_for(tokens) for tokens in (1, 64, 65)] == ["dense_router_decode"] * 2 + ["dense_router_prefill"]
    assert dense.op_for(1, padded=True) == "dense_router_prefill"
    assert table.op_for(1) == table.op_for(64, padded=True) == "hash_router_fused"
    assert table.op_for(8192) == "hash_router_scored"
    wide = Router("dense", hidden_size=128, experts=1024, top_k=8)
    odd = Router("dense", hidden_size=72, experts=16, top_k=4)
    assert wide.op_for(1) == odd.op_for(1) == "dense_router_prefill"
    for router, preset in ((wide, replace(FLASH, hidden_size=128)), (odd, replace(FLASH, hidden_size=72))):
        weights, _ = router(batch(3, preset=preset)[0])
        assert weights.shape == (3, router.top_k)


@pytest.mark.parametrize("tokens", [5, 2500])
@pytest.mark.parametrize("mode", MODES)
def test_padding(mode: str, tokens: int, device: str) -> None:
    router = loaded(mode, device)
    hidden, token_ids = batch(tokens, device)
    mask = torch.arange(tokens, device=device) % 2 == 1
    clean_weights, clean_ids = router(hidden, token_ids)
    weights, ids = router(hidden, token_ids, mask)
    assert (ids[mask] == -1).all()
    assert (weights[mask] == 0).all()
    assert torch.equal(ids[~mask], clean_ids[~mask])
    torch.testing.assert_close(weights[~mask], clean_weights[~mask], rtol=3e-6, atol=0)


@pytest.mark.parametrize("tokens", [3, 2500])
@pytest.mark.parametrize("mode", MODES)
def test_writes_to_given_outputs(mode: str, tokens: int, device: str) -> None:
    router = loaded(mode, device)
    hidden, token_ids = batch(tokens, device)
    weights = poison(torch.empty(tokens + 1, router.top_k, device=device))
    ids = poison(torch.empty(tokens + 1, router.top_k, dtype=torch.int32, device=device))
    results = router(hidden, token_ids, out_weights=weights[:tokens], out_ids=ids[:tokens])
    for result, buffer, plain in zip(results, (weights, ids), router(hidden, token_ids), strict=True):
        assert result.data_ptr() == buffer.data_ptr()
        assert torch.equal(result, plain)
        assert is_poison(buffer[tokens]).all()


def test_options_are_passed_on(device: str) -> None:
    for mode in MODES:
        plain = loaded(mode, device)
        tensors = plain.state_dict()
        raw = Router.from_preset(mode, FLASH, device=device, scale=1.0, renormalize=False)  # type: ignore[arg-type]
        damped = Router.from_preset(mode, FLASH, device=device, epsilon=1e9)  # type: ignore[arg-type]
        raw.load_state_dict(tensors)
        damped.load_state_dict(tensors)
        hidden, token_ids = batch(4, device)
        scores = raw(hidden, token_ids)[0]
        weights = plain(hidden, token_ids)[0]
        torch.testing.assert_close(weights, 1.5 * scores / scores.sum(dim=1, keepdim=True))
        assert (damped(hidden, token_ids)[0] < 1e-6).all()


class Model(torch.nn.Module):
    """Modules nested as in the models, with the routers where their gates are."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for mode in modes:
            layer, layer.ffn = torch.nn.Module(), torch.nn.Module()
            layer.ffn.gate = Router.from_preset(mode, FLASH)  # type: ignore[arg-type]
            self.layers.append(layer)


def model_tensors(modes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A checkpoint's gates under the models' names."""
    return {
        f"layers.{layer}.ffn.gate.{name}": tensor
        for layer, mode in enumerate(modes)
        for name, tensor in gate_tensors(mode, seed=layer).items()
    }


def test_state_dict_of_a_model_round_trips() -> None:
    tensors = model_tensors(("hash", "dense"))
    model = Model(("hash", "dense"))
    model.load_state_dict(tensors)
    saved = model.state_dict()
    assert set(saved) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor)
        assert saved[name].dtype == tensor.dtype
    again = Model(("hash", "dense"))
    again.load_state_dict(saved, assign=True)
    hidden, token_ids = batch(3)
    for a, b in zip(model.layers, again.layers, strict=True):
        assert torch.equal(a.ffn.gate(hidden, token_ids)[0], b.ffn.gate(hidden, token_ids)[0])


def test_tables_of_either_index_type_load() -> None:
    tensors = gate_tensors("hash")
    router = Router.from_preset("hash", FLASH)
    router.load_state_dict(tensors | {"tid2eid": tensors["tid2eid"].to(torch.int32)})
    assert torch.equal(router.tid2eid, tensors["tid2eid"])


@pytest.mark.parametrize(
    ("mode", "changes", "text"),
    [
        (
            "dense",
            {"weight": torch.zeros(32, 250)},
            "weight: expected bfloat16 or float32 [32, 256], got float32 [32, 250]",
        ),
        (
            "dense",
            {"weight": torch.zeros(32, 256, dtype=torch.float16)},
            "weight: expected bfloat16 or float32 [32, 256], got float16 [32, 256]",
        ),
        (
            "dense",
            {"weight": torch.full((32, 256), 0.1)},
            "weight: expected values that bfloat16 holds, got float32 ones that it does not; "
            "weight_dtype=torch.float32 keeps them",
        ),
        (
            "dense",
            {"bias_vl": torch.zeros(32)},
            "bias_vl: expected no such tensor in dense mode, got [32]; image_bias=True makes room for it",
        ),
        ("dense", {"bias": torch.zeros(31)}, "bias: expected float32 [32], got float32 [31]"),
        (
            "hash",
            {"tid2eid": torch.ones(500, 8, dtype=torch.int64)},
            "tid2eid: expected int64 or int32 [500, 6], got int64 [500, 8]",
        ),
        (
            "dense",
            {"bias": None, "tid2eid": torch.zeros(500, 6, dtype=torch.int64)},
            "tid2eid: expected no such tensor in dense mode, got [500, 6]; it is the other mode's",
        ),
        (
            "hash",
            {"tid2eid": None, "bias": torch.zeros(32)},
            "bias: expected no such tensor in hash mode, got [32]; it is the other mode's",
        ),
    ],
    ids=[
        "shape and dtype",
        "dtype",
        "float32",
        "bias of images",
        "bias",
        "table",
        "a hash layer's tensors",
        "a dense layer's tensors",
    ],
)
def test_load_errors_name_tensor_shape_and_need(mode: str, changes: dict[str, torch.Tensor | None], text: str) -> None:
    tensors = {name: tensor for name, tensor in (gate_tensors(mode) | changes).items() if tensor is not None}
    with pytest.raises(CheckpointError) as raised:
        Model((mode,)).load_state_dict({f"layers.0.ffn.gate.{name}": tensor for name, tensor in tensors.items()})
    assert str(raised.value) == f"Router: layers.0.ffn.gate.{text}"


def test_tensors_may_be_missing_where_the_caller_says_so() -> None:
    router = Router.from_preset("dense", FLASH)
    part = {"weight": gate_tensors("dense")["weight"]}
    assert router.load_state_dict(part, strict=False).missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        router.load_state_dict(part)


def write_checkpoint(folder: Path, layout: str) -> Path:
    """The same two layers in each way that checkpoints come."""
    tensors = model_tensors(("hash", "dense"))
    if layout == "file":
        save_file(tensors, folder / "gates.safetensors")
        return folder / "gates.safetensors"
    if layout == "folder":
        save_file(tensors, folder / "model.safetensors")
        return folder
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):  # a layer's tensors in different shards
        shards.setdefault(f"model-{number % 2 + 1:05}-of-00002.safetensors", {})[name] = tensor
    for shard, part in shards.items():
        save_file(part, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["file", "folder", "shards"])
def test_from_checkpoint(layout: str, tmp_path: Path, device: str) -> None:
    path = write_checkpoint(tmp_path, layout)
    for layer, mode in enumerate(("hash", "dense")):
        router = Router.from_checkpoint(path, layer, FLASH, device=device)
        assert router.mode == mode
        assert router.scale == FLASH.routed_scaling
        saved = router.state_dict()
        for name, tensor in gate_tensors(mode, seed=layer).items():
            assert torch.equal(saved.pop(name).cpu(), tensor)
        assert not saved
        hidden, token_ids = batch(2, device)
        want_weights, want_ids = expected(router, hidden[0], int(token_ids[0]))
        weights, ids = router(hidden, token_ids)
        assert ids[0].tolist() == want_ids
        assert weights[0].tolist() == pytest.approx(want_weights, rel=2e-6)


def test_checkpoint_errors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "file")
    with pytest.raises(CheckpointError, match=r"layers\.7\.ffn\.gate\.weight: no such tensor"):
        Router.from_checkpoint(path, 7, FLASH)
    with pytest.raises(
        CheckpointError, match=r"gate\.weight: expected bfloat16 or float32 \[384, 7168\], got bfloat16 \[32, 256\]"
    ):
        Router.from_checkpoint(path, 0, "v4-pro")
    with pytest.raises(InvalidArgumentError, match="preset: expected one of v4-flash, v4-pro, v41-flash, got 'v5'"):
        Router.from_checkpoint(path, 0, "v5")


def test_refuses_what_its_mode_cannot_take() -> None:
    sizes = {"hidden_size": 64, "experts": 8, "top_k": 2}
    with pytest.raises(InvalidArgumentError, match="mode: expected 'dense' or 'hash', got 'table'"):
        Router("table", **sizes)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidArgumentError, match="vocab_size: expected the number of token ids in hash mode, got None"
    ):
        Router("hash", **sizes)
    with pytest.raises(InvalidArgumentError, match="vocab_size: expected None in dense mode, got 9"):
        Router("dense", **sizes, vocab_size=9)
    with pytest.raises(InvalidArgumentError, match="token_ids: expected a tensor in hash mode, got None"):
        loaded("hash")(batch(1)[0])


@pytest.mark.parametrize("tokens", [4, 2500])
@pytest.mark.parametrize("mode", MODES)
def test_extents_that_do_not_agree(mode: str, tokens: int) -> None:
    """Every pair of extents that must agree, for each of the ops that a batch may take."""
    router = loaded(mode)
    hidden, token_ids = batch(tokens)
    out = torch.empty(tokens, FLASH.top_k), torch.empty(tokens, FLASH.top_k, dtype=torch.int32)
    mask = torch.zeros(tokens, dtype=torch.bool)
    wrong: list[tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]] = [
        ((hidden[:, :128], token_ids), {}),
        ((hidden[:, :, None], token_ids), {}),
        ((hidden, token_ids, mask[:-1]), {}),
        ((hidden, token_ids), {"out_weights": out[0][:-1]}),
        ((hidden, token_ids), {"out_weights": out[0][:, :-1]}),
        ((hidden, token_ids), {"out_ids": out[1][:-1]}),
        ((hidden, token_ids), {"out_ids": out[1][:, :-1]}),
    ]
    if mode == "hash":  # the dense mode ignores token ids
        wrong += [((hidden[:-1], token_ids), {}), ((hidden, token_ids[:-1]), {}), ((hidden, token_ids[:, None]), {})]
    for arguments, outputs in wrong:
        with pytest.raises(InvalidArgumentError, match="expected"):
            router(*arguments, **outputs)


@pytest.mark.parametrize("mode", MODES)
def test_casting_the_model_leaves_dtypes_alone(mode: str) -> None:
    router = loaded(mode)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in router.state_dict().items()}
    for cast in (router.half(), router.to(torch.float64), router.bfloat16()):
        for name, tensor in cast.state_dict().items():
            assert tensor.dtype == before[name][0]
            assert torch.equal(tensor, before[name][1])
    assert not any(parameter.requires_grad for parameter in router.parameters())
    assert all(tensor.is_meta for tensor in router.to("meta").state_dict().values())


@pytest.mark.parametrize("tokens", [3, 2500])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_as_one_graph(mode: str, tokens: int, device: str) -> None:
    router = loaded(mode, device)
    hidden, token_ids = batch(tokens, device)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(hidden, token_ids), router(hidden, token_ids), strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.parametrize("mode", MODES)
def test_exports(mode: str, device: str) -> None:
    router = loaded(mode, device)
    hidden, token_ids = batch(3, device)
    exported = torch.export.export(router, (hidden, token_ids)).module()
    for traced, eager in zip(exported(hidden, token_ids), router(hidden, token_ids), strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 2500])
@pytest.mark.parametrize("mode", MODES)
def test_captures_and_follows_new_inputs(mode: str, tokens: int) -> None:
    router = loaded(mode, "cuda")
    hidden, token_ids = batch(tokens, "cuda")
    router(hidden, token_ids)  # the library makes its workspace outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = router(hidden, token_ids)
    for seed in (2, 3):
        for tensor, new in zip((hidden, token_ids), batch(tokens, "cuda", seed=seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        for captured, eager in zip((weights, ids), router(hidden, token_ids), strict=True):
            assert torch.equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_one_router_on_two_streams(mode: str) -> None:
    router = loaded(mode, "cuda")
    inputs = [batch(64, "cuda", seed=seed) for seed in (5, 6)]
    alone = [router(*pair) for pair in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(router(*inputs[i]))
    torch.cuda.synchronize()
    for want, got in zip(alone, results, strict=True):
        assert all(torch.equal(a, b) for pair in got for a, b in zip(want, pair, strict=True))
