"""What ``config.json`` may look like: both of transformers' dialects, and the sizes read from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_target

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.target.checkpoint import open_folder
from kangaroo_kernels.model.target.config import LlamaConfig, RopeConfig, parse_config

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 67,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# the same rotary embedding in transformers 4's words and in transformers 5's
DIALECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": (
        {"rope_theta": 50000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    ),
    "linear, type": (
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "linear, no theta": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "dynamic, both words": (
        {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama3, rope_type": (
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ),
}


def write(folder: Path, *parts: dict[str, Any]) -> Path:
    """``folder`` with a ``config.json`` of these entries."""
    values: dict[str, Any] = {}
    for part in parts:
        values |= part
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_dialects_give_equal_logits(dialect: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    old, new = DIALECTS[dialect]
    folder = make_target(tmp_path / "model", std=0.15)
    tokens = torch.randint(67, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    unscaled = Kangaroo.from_pretrained(write(folder, SHAPE)).logits(tokens)
    shared = {"pretraining_tp": 1, "attention_dropout": 0.0}
    write(folder, SHAPE, shared, old, {"torch_dtype": "float32", "transformers_version": "4.37.2"})
    before = Kangaroo.from_pretrained(folder).logits(tokens)
    write(folder, SHAPE, shared, new, {"dtype": "float32", "transformers_version": "5.0.0"})
    after = Kangaroo.from_pretrained(folder).logits(tokens)
    assert torch.equal(before, after)
    if not dialect.startswith("dynamic"):  # which does nothing to a text as short as this one
        assert not torch.allclose(before, unscaled, atol=0.01)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder).float()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(after, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_dialects_give_equal_settings(dialect: str, tmp_path: Path) -> None:
    old, new = DIALECTS[dialect]
    before = open_folder(write(tmp_path / "old", SHAPE, old, {"torch_dtype": "bfloat16"})).config
    after = open_folder(write(tmp_path / "new", SHAPE, new, {"dtype": "bfloat16"})).config
    assert before == after
    assert before.dtype == torch.bfloat16
    assert before.rope.theta == new["rope_parameters"]["rope_theta"]
    assert before.rope.factor == new["rope_parameters"].get("factor", 1.0)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_stored_dtype(name: str, key: str, tmp_path: Path) -> None:
    assert open_folder(write(tmp_path, SHAPE, {key: name})).config.dtype == getattr(torch, name)


def test_every_number_is_read(tmp_path: Path) -> None:
    assert open_folder(write(tmp_path, SHAPE, {"head_dim": 20, "mlp_bias": True})).config == LlamaConfig(
        vocab_size=67,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=True,
        rope=RopeConfig(),
        eos_token_ids=(2, 5),
        dtype=torch.float32,
    )


def test_what_a_file_leaves_out(tmp_path: Path) -> None:
    """The first Llama checkpoints name neither key-value heads nor head_dim nor RoPE."""
    left_out = ("num_key_value_heads", "model_type", "tie_word_embeddings")
    values = {name: value for name, value in SHAPE.items() if name not in left_out}
    config = open_folder(write(tmp_path, values)).config
    assert config.num_key_value_heads == 4
    assert config.head_dim == 12
    assert not config.tie_word_embeddings
    assert config.rope == RopeConfig()
    assert config.dtype == torch.float32


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_end_of_text_tokens(eos: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    assert open_folder(write(tmp_path, SHAPE, {"eos_token_id": eos})).config.eos_token_ids == ids


def test_end_of_text_tokens_stop_the_text(tmp_path: Path) -> None:
    folder = make_target(tmp_path)
    tokens = Kangaroo.from_pretrained(folder).generate([1, 2, 3], max_new_tokens=20, plain=True).tokens
    values = json.loads((folder / "config.json").read_text())
    write(folder, values, {"eos_token_id": [66, tokens[7]]})
    generation = Kangaroo.from_pretrained(folder).generate([1, 2, 3], max_new_tokens=20, plain=True)
    assert generation.tokens == tokens[: tokens.index(tokens[7]) + 1]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize(("rope_type", "length"), [("default", 512), ("linear", 1024), ("dynamic", 1024)])
def test_context_length(rope_type: str, length: int, tmp_path: Path) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4}
    if rope_type != "default":
        rope["factor"] = 2.0
    assert open_folder(write(tmp_path, SHAPE, {"rope_parameters": rope})).config.context_length == length


def test_parse_config_needs_no_file() -> None:
    config = parse_config(SHAPE)
    assert config.inv_freq(10).shape == (6,)
    assert config.inv_freq(10)[0] == 1
