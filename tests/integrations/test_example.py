"""docs/examples/transformers_generate.py at toy size, as a user runs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.toy import toy_model

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "transformers_generate.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("transformers_generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(result: dict[str, Any], written: Path) -> None:
    assert json.loads(written.read_text()) == result
    for run in result["runs"].values():
        assert run["equal_tokens"] == run["same_best_token_on_the_same_text"] == run["of"]
        assert run["tokens_per_second"] > 0
    assert result["runs"]["float32"]["logits_error"] == 0
    assert 0 < result["runs"]["dsv4_kernels"]["logits_error"] < result["runs"]["transformers"]["logits_error"] < 0.03


def test_random_weights(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--prompt", "14", "--new-tokens", "4", "--json", str(written)]
    check(example.main(arguments), written)
    out = capsys.readouterr().out
    assert all(part in out for part in ("float32", "transformers", "dsv4_kernels", "4 of 4", "tokens per second"))


def test_a_checkpoint_folder(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_model(num_hash_layers=3).save_pretrained(tmp_path / "model")
    written = tmp_path / "figures.json"
    arguments = ["--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--prompt", "14", "--new-tokens", "4"]
    result = example.main([*arguments, "--json", str(written)])
    assert result["weights"] == str(tmp_path / "model")
    assert result["layers"] == 3
    check(result, written)


def test_the_models_sizes(example: Any) -> None:
    """As facts of the public checkpoints: kinds of layers, hash layers first, widths of transformers' defaults."""
    config = example.make_config("v4-flash", 8)
    assert (config.hidden_size, config.n_routed_experts, config.moe_intermediate_size) == (4096, 256, 2048)
    assert (config.num_attention_heads, config.q_lora_rank, config.o_groups, config.index_topk) == (64, 1024, 8, 512)
    kinds = [kind.partition("_")[0] for kind in config.layer_types]
    assert kinds == ["sliding", "sliding", *["compressed", "heavily"] * 3]
    assert config.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * 5
    pro = example.make_config("v4-pro", 3)
    assert (pro.hidden_size, pro.num_attention_heads, pro.routed_scaling_factor) == (7168, 128, 2.5)
