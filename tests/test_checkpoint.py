"""Checkpoints that are broken: each failure is an error that names the file and the tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.checkpoint import Checkpoint, CheckpointError
from dsv4_kernels.errors import KernelError
from dsv4_kernels.moe import Nvfp4MoE
from dsv4_kernels.presets import Preset
from dsv4_kernels.router import Router
from safetensors.torch import load_file, save_file

SIZE, EXPERTS = 128, 2
PRESET = Preset("small", SIZE, 2, EXPERTS, 1, SIZE, 0, 1.5, (0, 4))
GATE, EXPERT = "layers.3.ffn.gate.weight", "layers.3.ffn.experts.1.w2.scale"
FIRST, SECOND, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    result = {
        GATE: torch.randn(EXPERTS, SIZE, generator=generator).to(torch.bfloat16),
        "layers.3.ffn.gate.bias": torch.randn(EXPERTS, generator=generator),
    }
    for expert in range(EXPERTS):
        for matrix in ("w1", "w2", "w3"):
            name = f"layers.3.ffn.experts.{expert}.{matrix}"
            result[f"{name}.weight"] = torch.randint(
                -128, 128, (SIZE, SIZE // 2), dtype=torch.int8, generator=generator
            )
            scale = torch.randint(119, 124, (SIZE, SIZE // 32), dtype=torch.uint8, generator=generator)
            result[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    return result


def write(folder: Path) -> Path:
    """Two shards and their index: the gate and its layer's first expert, and the rest."""
    made = tensors()
    place = {name: SECOND if ".experts.1." in name else FIRST for name in made}
    for shard in (FIRST, SECOND):
        save_file({name: tensor for name, tensor in made.items() if place[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(folder: Path, shard: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    content = load_file(folder / shard)
    change(content)
    save_file(content, folder / shard)


def cut(folder: Path, shard: str, length: int) -> None:
    path = folder / shard
    path.write_bytes(path.read_bytes()[:length])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What breaks, for whom it shows, and what the text says beside the folder's name.
BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda f: cut(f, FIRST, 2000), "both", f"{FIRST}: layers.3.ffn.*: expected a complete .safetensors"),
    "truncated header": (lambda f: cut(f, FIRST, 20), "both", f"{FIRST}: layers.3.ffn.*cannot be read"),
    "truncated second shard": (
        lambda f: cut(f, SECOND, 5000), "experts", f"{SECOND}: layers.3.ffn.experts.1.w1.weight: expected a complete"
    ),
    "empty file": (lambda f: cut(f, FIRST, 0), "both", f"{FIRST}: layers.3.ffn.*cannot be read"),
    "no safetensors": (lambda f: (f / FIRST).write_text("version https://git-lfs\n" * 9), "both", f"{FIRST}: layers.3"),
    "missing shard": (
        lambda f: (f / SECOND).unlink(), "experts",
        f"{SECOND}: layers.3.ffn.experts.1.w1.weight: no such file, but {INDEX} says that the tensor is there",
    ),
    "shard is a folder": (lambda f: a_folder(f / FIRST), "both", f"{FIRST}: .*: no such file"),
    "shard lacks a tensor": (
        lambda f: edit_shard(f, SECOND, lambda t: t.pop(EXPERT)), "experts",
        f"{SECOND}: {EXPERT}: no such tensor in this shard, but {INDEX} says that it is here",
    ),
    "index names another shard": (
        lambda f: edit_index(f, lambda m: m.update({GATE: SECOND})), "gate", f"{SECOND}: {GATE}: no such tensor"
    ),
    "index lacks a tensor": (lambda f: edit_index(f, lambda m: m.pop(EXPERT)), "experts", f"{EXPERT}: no such"),
    "index lacks the layer": (
        lambda f: edit_index(f, lambda m: m.clear()), "both",
        r"layers.3.ffn.*: no such tensor, nor under model.layers.3.; is layers.3 a block of this checkpoint\?",
    ),
    "index names no file": (
        lambda f: edit_index(f, lambda m: m.update({GATE: None})), "both",
        f"{INDEX}: {GATE}: expected the name of a file, got None",
    ),
    "index is a list": (
        lambda f: (f / INDEX).write_text("[1, 2]"), "both", rf"{INDEX}: expected JSON with `weight_map`.*got \[1, 2\]"
    ),
    "index without weight_map": (
        lambda f: (f / INDEX).write_text('{"metadata": {}}'), "both",
        f"{INDEX}: expected JSON with .*, got the keys 'metadata'",
    ),
    "weight_map is a list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "both", f"{INDEX}: expected JSON"),
    "index is no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": {"a'), "both", f"{INDEX}: expected JSON"),
    "index is no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"), "both", f"{INDEX}: expected JSON"),
    "no index": (
        lambda f: (f / INDEX).unlink(), "both",
        f": expected a .safetensors file, or a folder with {INDEX} or model.safetensors",
    ),
    "dtype of the gate": (
        lambda f: edit_shard(f, FIRST, lambda t: t.update({GATE: t[GATE].half()})), "gate",
        rf"{FIRST}: {GATE}: expected bfloat16 or float32 \[2, 128\], got float16 \[2, 128\]",
    ),
    "shape of the gate": (
        lambda f: edit_shard(f, FIRST, lambda t: t.update({GATE: t[GATE][:1]})), "gate",
        rf"{FIRST}: {GATE}: expected bfloat16 or float32 \[2, 128\], got bfloat16 \[1, 128\]",
    ),
    "dtype of a scale": (
        lambda f: edit_shard(f, SECOND, lambda t: t.update({EXPERT: t[EXPERT].float()})), "experts",
        rf"{SECOND}: {EXPERT}: expected uint8 or float8_e8m0fnu \[128, 4\], got float32 \[128, 4\]",
    ),
    "shape of a scale": (
        lambda f: edit_shard(f, SECOND, lambda t: t.update({EXPERT: t[EXPERT].view(torch.uint8).flatten()})), "experts",
        rf"{SECOND}: {EXPERT}: expected uint8 or float8_e8m0fnu \[128, 4\], got uint8 \[512\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BROKEN)
def test_broken_checkpoints(breakage: str, tmp_path: Path) -> None:
    spoil, shows, text = BROKEN[breakage]
    write(tmp_path)
    layer = Nvfp4MoE(EXPERTS, SIZE, SIZE, top_k=1)
    layer.prepare_weights_from_checkpoint(tensors(seed=1), 3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    spoil(tmp_path)
    readers: dict[str, Callable[[], object]] = {
        "gate": lambda: Router.from_checkpoint(tmp_path, 3, PRESET),
        "experts": lambda: layer.prepare_weights_from_checkpoint(tmp_path, 3),
    }
    for kind, read in readers.items():
        if shows in ("both", kind):
            with pytest.raises(CheckpointError, match=text) as raised:
                read()
            assert str(tmp_path) in str(raised.value)
        else:
            read()
    if shows != "gate":  # nothing was written
        layer.run(torch.zeros(1, SIZE, dtype=torch.bfloat16), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_a_whole_checkpoint_loads(tmp_path: Path) -> None:
    """The folder that the tests above spoil, and its tensors as a mapping, give the same modules."""
    layers = [Nvfp4MoE(EXPERTS, SIZE, SIZE, top_k=1) for _ in range(2)]
    for layer, source in zip(layers, (write(tmp_path), tensors()), strict=True):
        layer.prepare_weights_from_checkpoint(source, 3)
        router = Router.from_checkpoint(source, 3, PRESET)
        assert torch.equal(router.weight, tensors()[GATE])
    for name, buffer in layers[0].named_buffers():
        assert torch.equal(buffer, layers[1].get_buffer(name))


def test_missing_path(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", str(tmp_path / "model.safetensors"), tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: expected a .safetensors file, or a folder with"):
            Checkpoint(path)


def test_a_single_file_that_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    cut(tmp_path, path.name, 3000)
    for source in (path, tmp_path):
        with pytest.raises(
            CheckpointError, match=f"{path}: {GATE}: expected a complete .safetensors file, got one that"
        ):
            Router.from_checkpoint(source, 3, PRESET)


def test_mappings_that_hold_something_else() -> None:
    given: dict[str, object] = dict(tensors())
    given[EXPERT] = [1, 2]
    with pytest.raises(CheckpointError, match=f"state dict: {EXPERT}: expected a tensor, got list"):
        Nvfp4MoE(EXPERTS, SIZE, SIZE).prepare_weights_from_checkpoint(given, 3)  # type: ignore[arg-type]
    del given[EXPERT]
    with pytest.raises(CheckpointError, match=f"state dict: {EXPERT}: no such tensor"):
        Nvfp4MoE(EXPERTS, SIZE, SIZE).prepare_weights_from_checkpoint(given, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("layers.3.", 3),
        ("model.layers.3.", 3),
        ("model.layers.3.", "model.layers.3"),
        ("mtp.0.", "mtp.0"),
        ("model.mtp.0.", "mtp.0"),
        ("language_model.model.layers.3.", "language_model.model.layers.3."),
    ],
)
def test_blocks_by_number_and_by_name(prefix: str, layer: int | str) -> None:
    given = {name.replace("layers.3.", prefix): tensor for name, tensor in tensors().items()}
    decoy = {name: tensor.new_zeros(tensor.shape) for name, tensor in tensors().items() if "gate" in name}
    given |= {name.replace("layers.3.", "layers.1."): tensor for name, tensor in decoy.items()}
    router = Router.from_checkpoint(given, layer, PRESET)
    assert torch.equal(router.weight, tensors()[GATE])
    moe, want = (Nvfp4MoE(EXPERTS, SIZE, SIZE, top_k=1) for _ in range(2))
    moe.prepare_weights_from_checkpoint(given, layer)
    want.prepare_weights_from_checkpoint(tensors(), 3)
    assert torch.equal(moe.l1_weight, want.l1_weight)


@pytest.mark.parametrize("layer", [4, -1, "mtp.1", "layers"])
def test_blocks_that_are_not_there(layer: int | str) -> None:
    block = layer if isinstance(layer, str) else f"layers.{layer}"
    for read in (
        lambda: Router.from_checkpoint(tensors(), layer, PRESET),
        lambda: Nvfp4MoE(EXPERTS, SIZE, SIZE).prepare_weights_from_checkpoint(tensors(), layer),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"is {block} a block of this checkpoint?")):
            read()


@pytest.mark.parametrize("layer", [None, 1.5, True, ""])
def test_layers_that_are_no_name(layer: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"layer: expected a number or the name of a block such as 'mtp\.0'"):
        Router.from_checkpoint(tensors(), layer, PRESET)  # type: ignore[arg-type]


def test_a_gate_by_the_names_of_transformers() -> None:
    given = {
        "model.layers.3.mlp.gate.weight": tensors()[GATE],
        "model.layers.3.mlp.gate.e_score_correction_bias": tensors()["layers.3.ffn.gate.bias"],
    }
    router = Router.from_checkpoint(given, 3, PRESET)
    assert router.mode == "dense"
    assert torch.equal(router.bias, tensors()["layers.3.ffn.gate.bias"])


def test_errors_are_the_packages_own() -> None:
    assert issubclass(CheckpointError, KernelError)
    assert issubclass(CheckpointError, ValueError)
